"""Clipping the gradient of every example: the sum against a loop over examples in
float64, the bound on what an example contributes, and the same on a mesh.
"""

import functools
import inspect
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from hypothesis import given, strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import helpers
from helpers import factors, norms, oc

BATCH = 10


def linear_loss(params, x):
    """Its gradient is the example itself."""
    products = jax.tree.map(lambda p, g: jnp.sum(p * g.astype(p.dtype)), params, x)
    return sum(jax.tree.leaves(products))


def network_loss(params, x, y):
    hidden = jnp.tanh(x @ params["dense"]["kernel"] + params["dense"]["bias"])
    return jnp.mean((hidden @ params["head"]["kernel"] - y) ** 2)


def network_case(batch=BATCH):
    params = helpers.random_tree(seed=3)
    rng = np.random.default_rng(4)
    x = rng.normal(size=(batch, 4)).astype(np.float32)
    return params, x, (10 * rng.normal(size=(batch, 2))).astype(np.float32)


def examples(batch=BATCH, dtype="float32", seed=5, scale=2.0):
    shapes = jax.tree.map(
        lambda shape: (batch, *shape), helpers.SHAPES, is_leaf=helpers.is_shape
    )
    return helpers.random_tree(dtype, seed=seed, scale=scale, shapes=shapes)


def zeros(dtype="float32"):
    return jax.tree.map(
        lambda shape: jnp.zeros(shape, dtype), helpers.SHAPES, is_leaf=helpers.is_shape
    )


def row(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def total_norm(tree):
    return helpers.vector_norm(jax.tree.leaves(helpers.truth(tree)))


# --------------------------------------------------------------------------------------
# The reference: a loop over examples, in float64
# --------------------------------------------------------------------------------------


def np_auto_s(norm, max_norm):
    return max_norm / (norm + 0.01 * max_norm)


def loop(grads, max_norm, label, factor, used=None):
    """The sum of the rows of `grads`, each clipped to a share of `max_norm`."""
    rows = []
    for i in range(len(jax.tree.leaves(grads)[0])):
        one = helpers.truth(row(grads, i))
        labels = {label(path) for path in helpers.paths_of(one)}
        share = max_norm / np.sqrt(len(labels))
        clip = helpers.by_label(label, helpers.constant(share), factor=factor)
        clipped = clip(one, one)
        if used is not None and not used[i]:
            clipped = jax.tree.map(np.zeros_like, clipped)
        rows.append(clipped)
    return jax.tree.map(lambda *x: sum(x), *rows)


NORMS = {
    "flat": (norms.global_norm, helpers.every_leaf_together),
    "leaf": (norms.leaf_norms, helpers.each_leaf),
    "layer": (norms.group_norms(), helpers.layer),
}
FACTORS = {
    "rescale": (factors.rescale, helpers.np_rescale),
    "auto_s": (factors.auto_s, np_auto_s),
}


@pytest.mark.parametrize(
    ("norm", "factor", "microbatch_size"),
    [
        ("flat", "rescale", None),
        ("flat", "rescale", 1),
        ("flat", "rescale", 99),
        ("flat", "auto_s", 5),
        ("leaf", "rescale", 4),
        ("leaf", "auto_s", None),
        ("layer", "rescale", 5),
        ("layer", "auto_s", 4),
    ],
)
def test_it_is_the_loop_over_examples(norm, factor, microbatch_size):
    params, x, y = network_case()
    where = np.arange(BATCH) % 4 != 3
    grad_fn = oc.per_example_clipped_grad(
        network_loss,
        0.7,
        norm=NORMS[norm][0],
        factor=FACTORS[factor][0],
        mean=False,
        microbatch_size=microbatch_size,
    )
    total, seen = jax.jit(grad_fn)(params, x, y, where=where)
    each = jax.vmap(jax.grad(network_loss), in_axes=(None, 0, 0))(params, x, y)
    expected = loop(each, 0.7, NORMS[norm][1], FACTORS[factor][1], where)
    chex.assert_trees_all_close(total, expected, rtol=2e-5, atol=1e-6)
    losses = jax.vmap(network_loss, in_axes=(None, 0, 0))(params, x, y)
    np.testing.assert_allclose(seen.losses, losses, rtol=1e-6)
    assert (seen.example_count, seen.nonfinite_count) == (8, 0)
    assert bool((seen.factors[~where] == 0).all())


def test_the_mean_is_over_the_examples_that_are_not_padding():
    params, x, y = network_case()
    where = np.arange(BATCH) % 4 != 3
    mean, total = (
        jax.jit(oc.per_example_clipped_grad(network_loss, 0.7, mean=mean))(
            params, x, y, where=where
        )[0]
        for mean in (True, False)
    )
    helpers.assert_close(mean, jax.tree.map(lambda g: g / 8, total), rtol=1e-4)


def test_a_norm_tells_each_example_from_the_rest():
    x = examples()
    _, seen = oc.per_example_clipped_grad(linear_loss, 10.0)(zeros(), x)
    expected = [total_norm(row(x, i)) for i in range(BATCH)]
    np.testing.assert_allclose(seen.norms, expected, rtol=1e-6)
    np.testing.assert_allclose(
        seen.factors, np.minimum(1, 10 / np.array(expected)), rtol=1e-6
    )
    assert seen.clipped_count == np.sum(np.array(expected) > 10)
    assert 0 < seen.clipped_count < BATCH


def test_a_mapping_gives_every_scope_its_own_threshold():
    x = examples()
    limits = {"dense": 0.5, "head": 3.0}
    total, seen = oc.per_example_clipped_grad(
        linear_loss, limits, norm=norms.leaf_norms, mean=False
    )(zeros(), x)
    clip = helpers.by_label(helpers.each_leaf, helpers.by_prefix({"dense/": 0.5}, 3.0))
    each = [clip(helpers.truth(row(x, i)), row(x, i)) for i in range(BATCH)]
    helpers.assert_close(total, jax.tree.map(lambda *g: sum(g), *each), rtol=1e-5)
    assert seen.norms.shape == (BATCH, 3)


def test_aux_comes_back_for_every_example():
    def loss_fn(params, x):
        return linear_loss(params, x), {"sum": jnp.sum(x["dense"]["bias"])}

    x = examples()
    for size in None, 3:
        _, seen = oc.per_example_clipped_grad(
            loss_fn, 1.0, has_aux=True, microbatch_size=size
        )(zeros(), x)
        np.testing.assert_allclose(
            seen.aux["sum"], np.sum(x["dense"]["bias"], axis=1), rtol=1e-5
        )


def test_examples_may_hold_random_keys_and_integers():
    def loss_fn(params, key, i):
        return params * (jax.random.normal(key) + i)

    keys, i = jax.random.split(jax.random.key(0), 5), jnp.arange(5)
    expected = jnp.sum(jax.vmap(jax.random.normal)(keys) + i)
    for size in None, 2:
        grad_fn = oc.per_example_clipped_grad(
            loss_fn, jnp.inf, mean=False, microbatch_size=size
        )
        np.testing.assert_allclose(grad_fn(1.0, keys, i)[0], expected, rtol=1e-6)


# --------------------------------------------------------------------------------------
# Every magnitude and dtype
# --------------------------------------------------------------------------------------


def mixed_magnitudes():
    """Squares overflow in some examples and vanish in others."""
    x = examples(6, scale=1.0)
    powers = jnp.array([1e25, 1.0, 1e-25, 1e30, 1e-30, 1e38 / 50])

    def scaled(leaf):
        return leaf * powers.reshape((-1,) + (1,) * (leaf.ndim - 1))

    return jax.tree.map(scaled, x)


@functools.cache
def clipped_to(norm):
    """`(max_norm, params, x, where=)` to the sum and what was seen, compiled once."""

    @functools.partial(jax.jit, static_argnames="microbatch_size")
    def run(max_norm, params, x, where=None, microbatch_size=None):
        return oc.per_example_clipped_grad(
            linear_loss,
            max_norm,
            norm=NORMS[norm][0],
            mean=False,
            microbatch_size=microbatch_size,
        )(params, x, where=where)

    return run


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("max_norm", [1e-28, 1.0, 1e27])
def test_every_magnitude_in_one_batch(norm, max_norm):
    x = mixed_magnitudes()
    total, seen = clipped_to(norm)(max_norm, zeros(), x)
    expected = loop(x, max_norm, NORMS[norm][1], helpers.np_rescale)
    chex.assert_trees_all_close(total, expected, rtol=1e-5, atol=1e-6 * max_norm)
    assert seen.nonfinite_count == 0
    if norm == "flat":
        sizes = [total_norm(row(x, i)) for i in range(6)]
        np.testing.assert_allclose(seen.norms, sizes, rtol=1e-6)


def test_the_rescue_is_one_branch_for_the_whole_batch():
    """With a branch for each example both sides would run, at every step."""
    grad_fn = oc.per_example_clipped_grad(linear_loss, 1.0)
    text = jax.jit(grad_fn).lower(zeros(), examples()).compile().as_text() or ""
    assert "conditional(" in text


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("norm", NORMS)
def test_an_example_that_is_not_finite_contributes_zero_and_is_counted(norm, bad):
    x = examples()
    broken = jax.tree.map(np.array, x)
    broken["dense"]["bias"][3, 1] = bad
    broken["head"]["kernel"][7, 0, 0] = bad
    used = ~np.isin(np.arange(BATCH), [3, 7])
    where = np.arange(BATCH) != 7  # padding, which nobody counts
    for size in None, 4:
        total, seen = clipped_to(norm)(
            1.0, zeros(), broken, where=where, microbatch_size=size
        )
        expected = loop(x, 1.0, NORMS[norm][1], helpers.np_rescale, used)
        chex.assert_trees_all_close(total, expected, rtol=1e-5, atol=1e-6)
        assert (seen.example_count, seen.nonfinite_count) == (9, 1)
        assert bool((seen.factors[np.array([3, 7])] == 0).all())


def test_a_batch_of_padding_gives_zeros():
    grads, seen = oc.per_example_clipped_grad(linear_loss, 1.0)(
        zeros(), examples(), where=np.zeros(BATCH, bool)
    )
    assert total_norm(grads) == 0
    assert seen.example_count == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
def test_low_precision_is_added_up_in_float32_and_rounded_once(dtype):
    x = examples(200, dtype, scale=0.5)
    grad_fn = oc.per_example_clipped_grad(linear_loss, 1.0, mean=False)
    total, _ = jax.jit(grad_fn)(zeros(dtype), x)
    exact = loop(x, 1.0, helpers.every_leaf_together, helpers.np_rescale)
    for ours, right in zip(jax.tree.leaves(total), jax.tree.leaves(exact), strict=True):
        assert ours.dtype == dtype
        eps = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(
            helpers.truth(ours), right, rtol=0.51 * eps, atol=1e-5
        )


# --------------------------------------------------------------------------------------
# The bound
# --------------------------------------------------------------------------------------


@functools.cache
def one_example(dtype, strict, norm="flat"):
    return jax.jit(
        lambda params, x, c: oc.per_example_clipped_grad(
            linear_loss, c, norm=NORMS[norm][0], mean=False, strict=strict
        )(params, x)[0]
    )


STRICT_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn")


def clipped_norms(dtype, strict, norm="flat"):
    """Of single examples in the sum's own dtype, over the threshold."""
    found = []
    for seed in range(40):
        x = examples(1, dtype, seed=seed, scale=1.0)
        max_norm = np.float32(0.5 + 0.01 * seed)
        total = one_example(dtype, strict, norm)(zeros(dtype), x, max_norm)
        found.append(total_norm(total) / float(max_norm))
    return np.array(found)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", STRICT_DTYPES)
def test_a_strict_bound_holds_exactly(dtype, norm):
    assert clipped_norms(dtype, True, norm).max() <= 1


@pytest.mark.parametrize("dtype", STRICT_DTYPES)
def test_without_strict_rounding_may_exceed_the_bound(dtype):
    """That is what `strict` is for, and how the test above can fail."""
    found = clipped_norms(dtype, False)
    # The factor is rounded in float32, the products in their own dtype.
    roundings = float(jnp.finfo(jnp.float32).eps) + float(jnp.finfo(dtype).eps)
    assert 1 < found.max() < 1 + roundings


def test_strict_loses_no_more_than_it_has_to():
    found = clipped_norms("bfloat16", True)
    assert found.min() > 1 - 1e-5


@functools.cache
def summed(norm, factor):
    return jax.jit(
        oc.per_example_clipped_grad(
            linear_loss,
            1.0,
            norm=NORMS[norm][0],
            factor=FACTORS[factor][0],
            mean=False,
            strict=True,
        )
    )


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("norm", NORMS)
@given(
    seed=st.integers(0, 10**6),
    place=st.integers(0, 3),
    power=st.integers(-30, 36),
    special=st.sampled_from([None, np.nan, np.inf]),
)
def test_one_example_moves_the_sum_no_further_than_its_bound(
    norm, factor, seed, place, power, special
):
    """Replaced: by twice the bound. Left out: by the bound."""
    batch = jax.tree.map(np.array, examples(4, seed=seed))
    other = jax.tree.map(np.copy, batch)
    replacement = examples(4, seed=seed + 1, scale=10.0**power)
    for leaf, new in zip(
        jax.tree.leaves(other), jax.tree.leaves(replacement), strict=True
    ):
        leaf[place] = new[place] if special is None else special
    where = np.arange(4) != place
    run = summed(norm, factor)
    everything = helpers.truth(run(zeros(), batch, where=np.ones(4, bool))[0])
    replaced = helpers.truth(run(zeros(), other, where=np.ones(4, bool))[0])
    left_out = helpers.truth(run(zeros(), batch, where=where)[0])
    rounding = 1e-6  # of the sums, in float32
    for changed, bound in (replaced, 2.0), (left_out, 1.0):
        distance = jax.tree.map(lambda a, b: a - b, everything, changed)
        assert total_norm(distance) <= bound + rounding


# --------------------------------------------------------------------------------------
# Compiled
# --------------------------------------------------------------------------------------


def test_microbatches_bound_the_memory():
    def loss_fn(params, x):
        return jnp.sum(jnp.tanh(x @ params) ** 2)

    params, x = jnp.ones((64, 256)), jnp.ones((64, 64))

    def temporary(size):
        grad_fn = oc.per_example_clipped_grad(loss_fn, 1.0, microbatch_size=size)
        memory: Any = jax.jit(grad_fn).lower(params, x).compile().memory_analysis()
        return memory.temp_size_in_bytes

    assert temporary(4) < temporary(None) / 8


def test_thresholds_may_be_traced_and_swept():
    x = examples()

    def total(max_norm):
        return oc.per_example_clipped_grad(linear_loss, max_norm)(zeros(), x)[0]

    swept = jax.jit(jax.vmap(total))(jnp.array([0.5, 2.0]))
    helpers.assert_close(row(swept, 1), total(2.0), rtol=1e-5)


def test_it_is_traced_once_and_goes_through_scan():
    chex.clear_trace_counter()
    grad_fn = oc.per_example_clipped_grad(linear_loss, 1.0)
    optimizer = optax.sgd(0.1, momentum=0.9)
    x = examples()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def train(params):
        def step(carry, _):
            params, state = carry
            grads, seen = grad_fn(params, x)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), seen.clipped_count

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=3)

    _, counts = train(zeros())
    train(zeros())
    assert counts.shape == (3,)


# --------------------------------------------------------------------------------------
# Meshes
# --------------------------------------------------------------------------------------


def grid(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)


@functools.cache
def expected_case():
    params, x, y = network_case(32)
    grad_fn = oc.per_example_clipped_grad(network_loss, 0.7)
    return (params, x, y), *jax.jit(grad_fn)(params, x, y)


@pytest.mark.parametrize("microbatch_size", [None, 8, 3])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_batch_over_devices_under_jit(kind, microbatch_size):
    if kind == AxisType.Explicit and microbatch_size == 3:
        microbatch_size = 16  # explicit axes take no parts that devices can't share
    (params, x, y), expected, seen = expected_case()
    mesh = grid(kind)
    rows = NamedSharding(mesh, P("data"))
    grad_fn = oc.per_example_clipped_grad(
        network_loss, 0.7, microbatch_size=microbatch_size
    )
    with jax.set_mesh(mesh):
        params = jax.device_put(params, NamedSharding(mesh, P()))
        x, y = jax.device_put((x, y), rows)
        grads, found = jax.jit(grad_fn)(params, x, y)
    chex.assert_trees_all_close(grads, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.norms, seen.norms, rtol=1e-5)
    assert found.clipped_count == seen.clipped_count


ROWS = oc.PerExample(P("data"), P("data"), P("data"), P("data"), P(), P(), P())


@pytest.mark.parametrize("microbatch_size", [None, 3])
def test_a_batch_over_devices_inside_shard_map(microbatch_size):
    (params, x, y), expected, seen = expected_case()
    mapped = jax.shard_map(
        oc.per_example_clipped_grad(network_loss, 0.7, microbatch_size=microbatch_size),
        mesh=grid(),
        in_specs=(P(), P("data"), P("data")),
        out_specs=(P(), ROWS),
    )
    grads, found = jax.jit(mapped)(params, x, y)
    chex.assert_trees_all_close(grads, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.norms, seen.norms, rtol=1e-5)
    assert found.clipped_count == seen.clipped_count
    assert found.example_count == 32


def test_autodiff_alone_would_add_up_devices_before_the_clip():
    """What the function takes care of: the naive clip inside `shard_map` is another."""
    (params, x, y), expected, _ = expected_case()
    clip = oc.clip_by_global_norm(0.7)

    def naive(params, x, y):
        each = jax.vmap(jax.grad(network_loss), in_axes=(None, 0, 0))(params, x, y)
        clipped = jax.vmap(lambda g: clip.update(g, None)[0])(each)
        return jax.tree.map(lambda g: jnp.sum(g, axis=0) / 8, clipped)

    mapped = jax.shard_map(
        naive, mesh=grid(), in_specs=(P(), P("data"), P("data")), out_specs=P()
    )
    assert not helpers.is_close(jax.jit(mapped)(params, x, y), expected, 0.1)


def test_parameters_that_are_split_are_measured_whole():
    """Tensor parallel: each device has half of the hidden units."""

    def loss_fn(params, x, y):
        hidden = jnp.tanh(x @ params["in"] + params["bias"])
        output = jax.lax.psum(hidden @ params["out"], "model")
        return jnp.mean((output - y) ** 2)

    def whole_loss(params, x, y):
        hidden = jnp.tanh(x @ params["in"] + params["bias"])
        return jnp.mean((hidden @ params["out"] - y) ** 2)

    shapes = {"bias": (6,), "in": (4, 6), "out": (6, 2)}
    specs = {"bias": P("model"), "in": P(None, "model"), "out": P("model")}
    params = helpers.random_tree(seed=1, shapes=shapes)
    _, x, y = network_case(16)
    for norm in norms.global_norm, norms.leaf_norms:
        grad_fn = functools.partial(
            oc.per_example_clipped_grad, max_norm=0.7, norm=norm
        )
        expected, seen = grad_fn(whole_loss)(params, x, y)
        mapped = jax.shard_map(
            grad_fn(loss_fn),
            mesh=grid(),
            in_specs=(specs, P("data"), P("data")),
            out_specs=(specs, ROWS),
        )
        grads, found = jax.jit(mapped)(params, x, y)
        chex.assert_trees_all_close(grads, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.norms, seen.norms, rtol=1e-5)


# --------------------------------------------------------------------------------------
# Adaptive thresholds
# --------------------------------------------------------------------------------------


def seen_of(norms_, max_norm):
    """What a clip says of gradients with these norms."""
    x = jnp.asarray(norms_, jnp.float32)
    return oc.per_example_clipped_grad(lambda p, x: p * x, max_norm)(0.0, x)[1]


def np_adapt(sizes, c, quantile, rate, noise=0.0, n=None):
    """Andrew et al., with the noise that was drawn."""
    n = len(sizes) if n is None else n
    b = (sum((size <= c) - 0.5 for size in sizes) + noise) / n + 0.5
    return c * np.exp(-rate * (np.clip(b, 0, 1) - quantile))


@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("c", [0.1, 3.0, 4.5, 100.0])
def test_the_threshold_moves_as_in_the_paper(c, quantile):
    sizes = [1.0, 2.0, 3.0, 7.0, 9.0]
    ours = oc.adapt_max_norm(c, seen_of(sizes, c), quantile=quantile, learning_rate=0.3)
    expected = np_adapt(sizes, c, quantile, 0.3)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


@pytest.mark.parametrize(("c", "share"), [(0.1, 0.0), (100.0, 1.0)])
def test_a_share_outside_of_0_and_1_is_clamped(c, share):
    # Of a batch said to be smaller than it was, as it is of one drawn at random.
    seen = seen_of([1.0, 2.0, 3.0, 7.0, 9.0], c)
    ours = oc.adapt_max_norm(c, seen, quantile=0.75, learning_rate=0.3, batch_size=2)
    np.testing.assert_allclose(ours, c * np.exp(-0.3 * (share - 0.75)), rtol=1e-6)


def test_the_threshold_finds_the_quantile():
    rng = np.random.default_rng(0)

    @jax.jit
    def step(c, sizes):
        return oc.adapt_max_norm(c, seen_of(sizes, c), quantile=0.8, learning_rate=0.1)

    c = 0.01
    for _ in range(300):
        c = step(c, rng.lognormal(size=500).astype(np.float32))
    np.testing.assert_allclose(c, np.exp(0.8416), rtol=0.1)


def test_an_example_that_is_not_finite_is_larger_than_any_threshold():
    sizes = [1.0, np.nan, 3.0, np.inf]
    ours = oc.adapt_max_norm(2.0, seen_of(sizes, 2.0))
    expected = np_adapt([1.0, np.inf, 3.0, np.inf], 2.0, 0.5, 0.2)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


@pytest.mark.parametrize("factor", [factors.soften, factors.auto_s])
def test_the_threshold_goes_by_norms_whatever_the_factor(factor):
    x = jnp.arange(1.0, 10.0)
    seen = oc.per_example_clipped_grad(lambda p, x: p * x, 4.0, factor=factor)(0.0, x)[
        1
    ]
    expected = np_adapt(list(range(1, 10)), 4.0, 0.5, 0.2)
    np.testing.assert_allclose(oc.adapt_max_norm(4.0, seen), expected, rtol=1e-6)


def test_the_noise_on_the_count_has_the_given_deviation():
    seen = seen_of(np.linspace(1, 100, 100), 50.0)

    def one(key):
        return oc.adapt_max_norm(50.0, seen, noise=5.0, key=key, batch_size=200)

    found = jax.vmap(one)(jax.random.split(jax.random.key(0), 4000))
    shares = 0.5 - np.log(np.asarray(found) / 50) / 0.2
    assert abs(shares.mean() - 0.5) < 0.002
    np.testing.assert_allclose(shares.std(), 5 / 200, rtol=0.05)


# --------------------------------------------------------------------------------------
# Optax
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [0.0, 1.0, 5.0, np.inf])
def test_the_drop_ins_give_optaxs_sums(max_norm):
    x = examples()
    pairs = [
        (oc.per_example_global_norm_clip, optax.per_example_global_norm_clip, ()),
        (oc.per_example_layer_norm_clip, optax.per_example_layer_norm_clip, (True,)),
        (oc.per_example_layer_norm_clip, optax.per_example_layer_norm_clip, (False,)),
    ]
    for ours, theirs, more in pairs:
        total, count = ours(x, max_norm, *more)
        expected, expected_count = theirs(x, max_norm, *more)
        chex.assert_trees_all_close(total, expected, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_equal(count, expected_count)


def test_empty_leaves_shift_no_counts():
    x = {"a": jnp.zeros((3, 0)), "b": jnp.full((3, 2), 5.0), "c": jnp.zeros((3, 1))}
    _, counts = oc.per_example_layer_norm_clip(x, 1.0)
    assert counts == {"a": 0, "b": 3, "c": 0}


def test_without_noise_it_is_optaxs_private_aggregate():
    params, x, y = network_case()
    each = jax.vmap(jax.grad(network_loss), in_axes=(None, 0, 0))(params, x, y)
    aggregate = optax.contrib.differentially_private_aggregate(
        0.7, 0.0, jax.random.key(0)
    )
    expected, _ = aggregate.update(each, aggregate.init(params))
    ours, _ = oc.per_example_clipped_grad(network_loss, 0.7)(params, x, y)
    chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_where_optax_lets_a_bad_example_in():
    """Its finite elements enter unclipped, and the NaN with them."""
    grads = [jnp.array([[np.nan, 100.0], [0.3, 0.4]])]
    theirs: Any = optax.per_example_global_norm_clip(grads, 1.0)[0]
    ours, count = oc.per_example_global_norm_clip(grads, 1.0)
    assert jnp.isnan(theirs[0][0]) and theirs[0][1] > 100
    np.testing.assert_allclose(ours[0], [0.3, 0.4], rtol=1e-6)
    assert count == 1


# --------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------


def test_wrong_arguments_raise_when_building():
    with pytest.raises(TypeError, match="loss_fn to be a function, got 3"):
        oc.per_example_clipped_grad(3, 1.0)
    with pytest.raises(TypeError, match="norm to be a function, got 'leaf'"):
        oc.per_example_clipped_grad(linear_loss, 1.0, norm="leaf")
    with pytest.raises(ValueError, match=r"max_norm >= 0, got -1.0"):
        oc.per_example_clipped_grad(linear_loss, -1.0)
    with pytest.raises(TypeError, match="max_norm to be a number, got <function"):
        oc.per_example_clipped_grad(linear_loss, optax.constant_schedule(1.0))
    with pytest.raises(ValueError, match=r"max_norm\['head'\] >= 0"):
        oc.per_example_clipped_grad(linear_loss, {"head": -1.0})
    with pytest.raises(TypeError, match="factor to be a function, got 'auto_s'"):
        oc.per_example_clipped_grad(linear_loss, 1.0, factor="auto_s")
    for size in 0, 2.5, True:
        with pytest.raises(ValueError, match="microbatch_size >= 1, an int, got"):
            oc.per_example_clipped_grad(linear_loss, 1.0, microbatch_size=size)


@pytest.mark.parametrize(
    "batch",
    [(), (jnp.ones(3), jnp.ones(2)), (jnp.ones(3), 1.0), (jnp.ones((0, 2)),)],
    ids=["none", "two sizes", "no axis", "no example"],
)
def test_a_batch_without_one_batch_axis_raises(batch):
    grad_fn = oc.per_example_clipped_grad(lambda params, *x: params, 1.0)
    with pytest.raises(ValueError, match=r"leading batch axis.*Bind to `loss_fn`"):
        grad_fn(0.0, *batch)


@pytest.mark.parametrize("where", [np.ones(3), np.ones(4, bool)], ids=["float", "4"])
def test_a_mask_that_does_not_fit_raises(where):
    grad_fn = oc.per_example_clipped_grad(lambda params, x: params * x, 1.0)
    with pytest.raises(ValueError, match="`where` to be 3 booleans, False for padding"):
        grad_fn(0.0, jnp.ones(3), where=where)


def test_a_norm_that_bounds_nothing_raises():
    for norm in (
        norms.unit_norms,
        norms.leaf_rms,
        helpers.ord_norm(norms.leaf_norms, 1),
        norms.excluding(norms.global_norm, "head"),
        helpers.twice_the_leaf_norm,
    ):
        with pytest.raises(ValueError, match="would not bound what an example contrib"):
            oc.per_example_clipped_grad(linear_loss, 1.0, norm=norm)


def inside(specs, **options):
    params, x, y = network_case(16)
    mapped = jax.shard_map(
        oc.per_example_clipped_grad(network_loss, 0.7),
        mesh=grid(),
        in_specs=(specs, P("data"), P("data")),
        out_specs=(specs, ROWS),
        **options,
    )
    return jax.eval_shape(mapped, params, x, y)


def test_params_split_over_the_axis_of_the_batch_raise():
    specs = {"dense": {"bias": P(), "kernel": P("data")}, "head": {"kernel": P()}}
    message = r"'dense/kernel' split over the mesh axes \['data'\].*`jax.lax.all_gather"
    with pytest.raises(ValueError, match=message):
        inside(specs)


def test_without_types_it_raises():
    with pytest.raises(ValueError, match=r"Use `shard_map\(..., check_vma=True\)`"):
        inside(P(), check_vma=False)


def test_params_gathered_before_are_whole():
    """The remedy in the message."""
    specs = {"dense": {"bias": P(), "kernel": P("data")}, "head": {"kernel": P()}}
    (params, x, y), expected, _ = expected_case()
    grad_fn = oc.per_example_clipped_grad(network_loss, 0.7)

    def step(params, x, y):
        piece = params["dense"]["kernel"]
        whole = jax.lax.all_gather(piece, "data", tiled=True, to="invarying")
        params = {**params, "dense": {**params["dense"], "kernel": whole}}
        return grad_fn(params, x, y)[0]

    if "to" not in inspect.signature(jax.lax.all_gather).parameters:
        return  # of JAX 0.10
    mapped = jax.shard_map(
        step, mesh=grid(), in_specs=(specs, P("data"), P("data")), out_specs=P()
    )
    grads = jax.jit(mapped)(params, x, y)
    chex.assert_trees_all_close(grads, expected, rtol=1e-5, atol=1e-6)


def shared_loss(params, x, y):
    return jax.lax.pmean(network_loss(params, x, y), "data")


@pytest.mark.parametrize(
    ("loss_fn", "rows"),
    [(shared_loss, P("data")), (network_loss, P("data", "model"))],
    ids=["mean of devices", "parts of an example"],
)
def test_a_loss_that_is_not_one_examples_own_raises(loss_fn, rows):
    """Gradients of several devices would be one before the clip."""

    def part(params, x, y):
        own = loss_fn(params, jnp.tile(x, 2)[:4], y)
        return own if loss_fn is shared_loss else jax.lax.psum(own, "model")

    mapped = jax.shard_map(
        lambda *args: oc.per_example_clipped_grad(part, 0.7)(*args)[0],
        mesh=grid(),
        in_specs=(P(), rows, P("data")),
        out_specs=P(),
    )
    params, x, y = network_case(16)
    with pytest.raises(ValueError, match="loss of one example, got one that is the sa"):
        jax.eval_shape(mapped, params, x, y)


@pytest.mark.parametrize("check_vma", [True, False])
def test_the_drop_ins_do_not_guess_inside_shard_map(check_vma):
    mapped = jax.shard_map(
        lambda g: oc.per_example_global_norm_clip(g, 1.0)[0],
        mesh=grid(),
        in_specs=P("data"),
        out_specs=P(),
        check_vma=check_vma,
    )
    with pytest.raises(ValueError, match="Use `per_example_clipped_grad`"):
        jax.eval_shape(mapped, jnp.ones((8, 3)))


def test_wrong_arguments_of_the_adaptive_threshold_raise():
    seen = seen_of([1.0, 2.0], 1.0)
    with pytest.raises(ValueError, match=r"0 <= quantile <= 1, got 1\.5"):
        oc.adapt_max_norm(1.0, seen, quantile=1.5)
    with pytest.raises(ValueError, match="learning_rate >= 0, got -1"):
        oc.adapt_max_norm(1.0, seen, learning_rate=-1)
    with pytest.raises(TypeError, match="beside the gradients, got tuple"):
        oc.adapt_max_norm(1.0, (1.0, seen))
    with pytest.raises(ValueError, match=r"key for noise=1.0, got none. Pass `key=`"):
        oc.adapt_max_norm(1.0, seen, noise=1.0)
