"""Clipping the gradient of every example, against a loop over examples in float64."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

import helpers
import in_numpy
from example_cases import (
    BATCH,
    examples,
    linear_loss,
    network_case,
    network_loss,
    row,
    zeros,
)
from helpers import oc
from optaxclip import factors, norms


def total_norm(tree):
    return in_numpy.vector_norm(jax.tree.leaves(helpers.truth(tree)))


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
        clip = in_numpy.by_label(label, in_numpy.constant(share), factor=factor)
        clipped = clip(one, one)
        if used is not None and not used[i]:
            clipped = jax.tree.map(np.zeros_like, clipped)
        rows.append(clipped)
    return jax.tree.map(lambda *x: sum(x), *rows)


NORMS = {
    "flat": (norms.global_norm, in_numpy.every_leaf_together),
    "leaf": (norms.leaf_norms, in_numpy.each_leaf),
    "layer": (norms.group_norms(), in_numpy.layer),
}
FACTORS = {
    "rescale": (factors.rescale, in_numpy.np_rescale),
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
    clip = in_numpy.by_label(
        in_numpy.each_leaf, in_numpy.by_prefix({"dense/": 0.5}, 3.0)
    )
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
    expected = loop(x, max_norm, NORMS[norm][1], in_numpy.np_rescale)
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
        expected = loop(x, 1.0, NORMS[norm][1], in_numpy.np_rescale, used)
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
    exact = loop(x, 1.0, in_numpy.every_leaf_together, in_numpy.np_rescale)
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
