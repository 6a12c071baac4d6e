"""Clips that look at the weights, trust ratios, Clippy and QK-Clip, and NumPy loops."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import helpers
from helpers import oc

# --------------------------------------------------------------------------------------
# The equations in NumPy, float64
# --------------------------------------------------------------------------------------


def np_trust_ratio(update, param, *, max_ratio=1.0, trust_coefficient=1.0):
    update, param = np.float64(update), np.float64(param)
    if not np.isfinite(update).all():
        return update * np.nan
    size, allowed = np.sqrt(np.sum(update**2)), np.sqrt(np.sum(param**2))
    if size == 0 or allowed == 0:
        return update
    return update * min(max_ratio, trust_coefficient * allowed / size)


def np_clippy(update, param, *, relative=0.5, absolute=1e-2):
    update, param = np.float64(update), np.float64(param)
    if not np.isfinite(update).all():
        return update * np.nan
    factor = 1.0
    for u, w in zip(update.ravel(), param.ravel(), strict=True):
        if u != 0:
            factor = min(factor, (relative * abs(w) + absolute) / abs(u))
    return update * factor


def np_relative_step(updates, params, *, relative=0.03, eps=1.0, power=0.5):
    """Arrays of steps; all of a step's elements have one norm."""
    out, t = [], 1
    for u, w in zip(updates.astype(float), params.astype(float), strict=True):
        size = np.sqrt(np.sum(u**2))
        if not np.isfinite(size):
            out.append(u * np.nan)
        elif size == 0:
            out.append(u)
        else:
            allowed = relative * max(np.sqrt(np.sum(w**2)), eps) / t**power
            out.append(u * min(1.0, allowed / size))
            t += 1
    return np.stack(out)


def np_qk_clip(query, key, max_logits, *, threshold=100.0, alpha=0.5):
    """Kernels (features, heads, head_dim), with fewer heads in the key."""
    query, key = np.array(query, np.float64), np.array(key, np.float64)
    eta = [min(1, threshold / s) if 0 < s < np.inf else 1.0 for s in max_logits]
    group = query.shape[-2] // key.shape[-2]
    for h, e in enumerate(eta):
        query[..., h, :] *= e**alpha
    for h in range(key.shape[-2]):
        key[..., h, :] *= min(eta[h * group : (h + 1) * group]) ** (1 - alpha)
    return query, key


RULES: dict[str, tuple[Any, Any]] = {
    "trust_ratio": (oc.clip_by_trust_ratio, np_trust_ratio),
    "clippy": (oc.clippy, np_clippy),
}
every_rule = pytest.mark.parametrize("name", RULES)
SHAPES = {"a": (3, 4), "b": (5,), "c": ()}


def step(clip, updates, params):
    return jax.jit(lambda u, p: clip.update(u, clip.init(p), p))(updates, params)


def random_history(steps=300, seed=0):
    """Updates and params, step by step: spikes, zeros, NaN, Inf, dead weights."""
    rng = np.random.default_rng(seed)

    def one(shape):
        sizes = 10.0 ** rng.uniform(-3, 3, (2, steps, *(1 for _ in shape)))
        updates, params = sizes * rng.normal(size=(2, steps, *shape))
        kind = rng.integers(12, size=steps)
        updates[kind == 0] = 0
        params[kind == 1] = 0
        updates[kind == 2] *= 1e30
        updates.reshape(steps, -1)[kind == 3, 0] = np.nan
        updates.reshape(steps, -1)[kind == 4, -1] = -np.inf
        params.reshape(steps, -1)[kind == 5, 0] = 0
        return updates.astype(np.float32), params.astype(np.float32)

    pairs = {name: one(shape) for name, shape in SHAPES.items()}
    return tuple({name: pair[i] for name, pair in pairs.items()} for i in (0, 1))


@functools.cache
def over_history(name):
    """The clip over all steps in one compiled scan: updates, states."""
    clip, (updates, params) = RULES[name][0](), random_history()
    fresh = clip.init({name: jnp.zeros(shape) for name, shape in SHAPES.items()})

    def body(state, some):
        out, state = clip.update(some[0], state, some[1])
        return state, (out, state)

    return jax.jit(lambda *x: jax.lax.scan(body, fresh, x)[1])(updates, params)


def by_reference(name, **options):
    updates, params = random_history()
    reference = functools.partial(RULES[name][1], **options)
    with np.errstate(all="ignore"):
        return {
            leaf: np.stack([reference(*x) for x in zip(u, params[leaf], strict=True)])
            for leaf, u in updates.items()
        }


@every_rule
def test_a_history_of_spikes_zeros_and_nans_is_the_equation(name):
    clipped, states = over_history(name)
    assert helpers.is_close(clipped, by_reference(name), rtol=1e-5)
    assert states.norms.shape == (300, 3)
    counts = np.cumsum(np.asarray(states.factors) < 1, axis=0)
    np.testing.assert_array_equal(states.clipped_count, counts)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("trust_ratio", {"max_ratio": 1.001}),
        ("trust_ratio", {"trust_coefficient": 0.999}),
        ("clippy", {"relative": 0.501}),
        ("clippy", {"absolute": 1.01e-2}),
    ],
)
def test_another_constant_is_another_rule(name, options):
    clipped, _ = over_history(name)
    assert not helpers.is_close(clipped, by_reference(name, **options), rtol=1e-5)


SCALES = (1e-37, 1e-20, 1.0, 1e20, 1e37)


@every_rule
@pytest.mark.parametrize("size", SCALES)
@pytest.mark.parametrize("scale", SCALES)
def test_every_magnitude_of_updates_and_params(name, size, scale):
    options = {} if name == "trust_ratio" else {"absolute": 0.0}
    updates = {"w": size * jnp.array([[3, -1], [0.5, 2]])}
    params = {"w": scale * jnp.array([[1, 2], [-2, 0.5]])}
    clipped, _ = compiled(name)(updates, params)
    expected = RULES[name][1](updates["w"], params["w"], **options)
    np.testing.assert_allclose(clipped["w"], expected, rtol=1e-5, atol=1e-37)


@functools.cache
def compiled(name):
    options = {} if name == "trust_ratio" else {"absolute": 0.0}
    clip = RULES[name][0](**options)
    return jax.jit(lambda u, p: clip.update(u, clip.init(p), p))


@every_rule
def test_params_are_needed(name):
    clip = RULES[name][0]()
    updates = {"w": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"Expected params, .*clip\.update\(updates, "):
        clip.update(updates, clip.init(updates))


@every_rule
def test_params_of_another_shape_raise_with_the_path(name):
    clip = RULES[name][0]()
    updates = {"w": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"one shape, got .* at 'w'"):
        clip.update(updates, clip.init(updates), {"w": jnp.ones(4, np.float32)})


@every_rule
def test_no_state_is_fine(name):
    updates, params = helpers.updates_and_params()
    clip = RULES[name][0]()
    clipped, state = clip.update(updates, optax.EmptyState(), params)
    helpers.assert_close(clipped, step(clip, updates, params)[0])
    assert state == optax.EmptyState()


# --------------------------------------------------------------------------------------
# Relative steps
# --------------------------------------------------------------------------------------


@functools.cache
def relative_steps():
    """5000 random steps of random params: both, and what is left of the steps."""
    rng = np.random.default_rng(1)
    sizes = 10.0 ** rng.uniform([[-4], [-2]], [[2], [4]], (2, 5000))[..., None]
    updates, params = sizes * rng.normal(size=(2, 5000, 6))
    kind = rng.integers(10, size=5000)
    updates[kind == 0] = 0
    updates[kind == 1] *= 1e30
    updates[kind == 2, 0] = np.nan
    updates[kind == 3, 5] = np.inf
    params[kind == 4] = 0
    updates, params = np.float32(updates), np.float32(params)
    clip = oc.clip_by_relative_step()

    def body(state, some):
        (u, w), parts = some, lambda x: {"a": x[:4].reshape(2, 2), "b": x[4:]}
        out, state = clip.update(parts(u), state, parts(w))
        return state, (jnp.append(out["a"].ravel(), out["b"]), state.factors)

    fresh = clip.init({"a": jnp.zeros((2, 2)), "b": jnp.zeros(2)})
    clipped, _ = jax.jit(lambda *x: jax.lax.scan(body, fresh, x)[1])(updates, params)
    return updates, params, clipped


def is_relative_step(**options):
    updates, params, clipped = relative_steps()
    with np.errstate(all="ignore"):
        expected = np_relative_step(updates, params, **options)
    return helpers.is_close(clipped, expected, rtol=1e-5)


def test_five_thousand_relative_steps_are_the_equation():
    assert is_relative_step()


@pytest.mark.parametrize(
    "options", [{"relative": 0.03001}, {"eps": 1.001}, {"power": 0.4999}]
)
def test_another_constant_is_another_relative_step(options):
    assert not is_relative_step(**options)


@pytest.mark.parametrize("learning_rate", [1e-3, 1.0, 1e3])
def test_after_the_learning_rate_it_bounds_what_is_applied(learning_rate):
    params = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
    optimizer = optax.chain(optax.adam(learning_rate), oc.clip_by_relative_step())

    def body(carry, _):
        params, state = carry
        updates, state = optimizer.update(params, state, params)  # half their square
        share = oc.global_norm(updates) / oc.global_norm(params)
        return (optax.apply_updates(params, updates), state), share

    _, steps = jax.lax.scan(body, (params, optimizer.init(params)), length=50)
    bounds = 0.03 / np.sqrt(np.arange(50) + 1)
    assert (np.asarray(steps) <= bounds * (1 + 1e-6)).all()
    at_bound = np.isclose(steps, bounds, rtol=1e-5, atol=0)
    assert at_bound.all() if learning_rate >= 1 else not at_bound.any()


def test_a_model_whose_weights_are_all_zero_moves():
    updates, params = {"w": jnp.array([0.0, 5.0])}, {"w": jnp.zeros(2)}
    clipped, _ = step(oc.clip_by_relative_step(), updates, params)
    np.testing.assert_allclose(clipped["w"], [0.0, 0.03], rtol=1e-6)


@pytest.mark.parametrize("bad", [0.0, jnp.nan, jnp.inf])
def test_steps_of_zeros_and_nans_are_not_counted(bad):
    clip, params = oc.clip_by_relative_step(), jnp.array([10.0])
    state = clip.init(params)
    for size in 5.0, bad, bad, 5.0:
        updates, state = clip.update(jnp.array([size]), state, params)
    np.testing.assert_allclose(updates, 0.3 / np.sqrt(2), rtol=1e-6)


@pytest.mark.parametrize("what", ["relative", "eps"])
def test_a_negative_relative_step_raises(what):
    with pytest.raises(ValueError, match=rf"Expected {what} >= 0, got -1"):
        oc.clip_by_relative_step(**{what: -1.0})


def test_a_relative_step_needs_params():
    clip, updates = oc.clip_by_relative_step(), jnp.ones(2)
    with pytest.raises(ValueError, match=r"Expected params, .*clip\.update\(updates, "):
        clip.update(updates, clip.init(updates))


# --------------------------------------------------------------------------------------
# Trust ratios
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("coefficient", [1.0, 0.1])
def test_below_the_cap_it_is_optax(coefficient):
    updates, params = helpers.updates_and_params(scale=0.2)
    ours = oc.clip_by_trust_ratio(jnp.inf, coefficient)
    theirs: Any = optax.scale_by_trust_ratio(trust_coefficient=coefficient)
    expected, _ = theirs.update(updates, theirs.init(params), params)
    helpers.assert_close(step(ours, updates, params)[0], expected)


def test_the_cap_holds_leaf_by_leaf():
    params = {"a": jnp.array([30.0, 40.0]), "b": jnp.array([0.3, 0.4])}
    updates = {"a": jnp.array([1.0, 0.0]), "b": jnp.array([1.0, 0.0])}
    clipped, state = step(oc.clip_by_trust_ratio(10.0), updates, params)
    np.testing.assert_allclose(clipped["a"], [10.0, 0.0], rtol=1e-6)
    np.testing.assert_allclose(clipped["b"], [0.5, 0.0], rtol=1e-6)
    np.testing.assert_allclose(state.factors, [10.0, 0.5], rtol=1e-6)
    np.testing.assert_allclose(state.max_norms, [50.0, 0.5], rtol=1e-6)


@pytest.mark.parametrize("max_ratio", [1.0, 10.0])
def test_a_leaf_of_params_or_updates_at_zero_passes_unchanged(max_ratio):
    updates = {"a": jnp.array([3e38, -1e-45]), "b": jnp.zeros(2)}
    params = {"a": jnp.zeros(2), "b": jnp.ones(2)}
    clipped, state = step(oc.clip_by_trust_ratio(max_ratio), updates, params)
    assert helpers.bits(clipped) == helpers.bits(updates)
    assert np.isinf(helpers.shown(state.max_norms)[0])


def test_with_the_learning_rate_as_cap_it_is_larc():
    updates, params = helpers.updates_and_params()
    rate, eta = 0.1, 0.02
    ours = optax.chain(oc.clip_by_trust_ratio(rate, eta), optax.scale(-1.0))
    found, _ = step(ours, updates, params)
    expected = jax.tree.map(
        lambda g, w: -g * min(eta * np.linalg.norm(w) / np.linalg.norm(g), rate),
        helpers.truth(updates),
        helpers.truth(params),
    )
    helpers.assert_close(found, expected)


@pytest.mark.parametrize("what", ["max_ratio", "trust_coefficient"])
def test_a_negative_ratio_raises(what):
    with pytest.raises(ValueError, match=f"Expected {what} >= 0, got -1"):
        oc.clip_by_trust_ratio(**{what: -1})


# --------------------------------------------------------------------------------------
# Clippy
# --------------------------------------------------------------------------------------


def test_clippy_by_hand():
    updates = {"w": jnp.array([2.0, -0.1])}
    params = {"w": jnp.array([-4.0, 0.0])}
    clipped, state = step(oc.clippy(0.1, 0.02), updates, params)
    np.testing.assert_allclose(clipped["w"], [0.4, -0.02], rtol=1e-6)  # the 2nd binds
    np.testing.assert_allclose(state.norms, [5.0], rtol=1e-6)
    np.testing.assert_allclose(state.factors, [0.2], rtol=1e-6)
    assert list(state.max_norms) == [1.0]


def test_no_weight_changes_by_more_than_its_share():
    updates, params = helpers.updates_and_params(scale=30.0)
    clipped, state = step(oc.clippy(0.2, 0.03), updates, params)
    shares = jax.tree.map(
        lambda u, w: np.abs(u) / (0.2 * np.abs(w) + 0.03),
        helpers.truth(clipped),
        helpers.truth(params),
    )
    largest = [np.max(x) for x in jax.tree.leaves(shares)]
    np.testing.assert_allclose(largest, 1.0, rtol=1e-6)  # each leaf uses it up
    assert (np.asarray(state.factors) < 1).all()


def test_without_an_absolute_share_a_weight_at_zero_may_not_move():
    updates = {"a": jnp.array([1.0, 1.0]), "b": jnp.array([0.0, 1.0])}
    params = {"a": jnp.array([0.0, 9.0]), "b": jnp.array([0.0, 9.0])}
    clipped, state = step(oc.clippy(0.5, 0.0), updates, params)
    np.testing.assert_array_equal(clipped["a"], [0.0, 0.0])
    assert helpers.bits(clipped["b"]) == helpers.bits(updates["b"])
    np.testing.assert_array_equal(state.factors, [0.0, 1.0])


def test_the_largest_update_of_the_smallest_weight_moves_it_by_its_share():
    updates, params = {"w": jnp.array([3e38])}, {"w": jnp.array([1e-36])}
    clipped, state = step(oc.clippy(0.5, 0.0), updates, params)
    np.testing.assert_allclose(clipped["w"], [5e-37], rtol=1e-5)
    assert np.isinf(oc.summary(state)["clip/norm/0"])


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30, 3e38])
def test_complex_updates_are_measured_by_their_modulus(scale):
    updates = {"w": jnp.array([0.6 + 0.8j, 0.1j], jnp.complex64) * scale}
    params = {"w": jnp.array([3.0 - 4.0j, 1.0], jnp.complex64) * 1e-3}
    clipped, _ = step(oc.clippy(0.1, 0.0), updates, params)
    factor = min(1, 5e-4 / scale, 1e-4 / (0.1 * scale))
    expected = np.asarray(updates["w"], np.complex128) * factor
    np.testing.assert_allclose(clipped["w"], expected, rtol=1e-5)


def test_an_element_that_may_not_move_and_does_not_has_no_ratio():
    # Beside one whose ratio, 2e35, is measured from an update that is scaled down.
    updates = {"w": jnp.array([0.0, 1e15])}
    params = {"w": jnp.array([0.0, 1e-20])}
    clipped, _ = step(oc.clippy(0.5, 0.0), updates, params)
    np.testing.assert_allclose(clipped["w"], [0.0, 5e-21], rtol=1e-6)


def test_clippy_after_the_learning_rate_bounds_what_is_applied():
    updates, params = helpers.updates_and_params(scale=100.0)
    tx = optax.chain(optax.sgd(0.3), oc.clippy(0.1, 1e-3))
    applied = optax.apply_updates(params, step(tx, updates, params)[0])
    for new, old in zip(jax.tree.leaves(applied), jax.tree.leaves(params), strict=True):
        bound = (0.1 * np.abs(old) + 1e-3) * (1 + 1e-4) + 1e-6
        assert (np.abs(new - old) <= bound).all()


@pytest.mark.parametrize("what", ["relative", "absolute"])
def test_a_negative_share_raises(what):
    with pytest.raises(ValueError, match=f"Expected {what} >= 0, got -1"):
        oc.clippy(**{what: -1})
    with pytest.raises(TypeError, match=f"Expected {what} to be a number"):
        oc.clippy(**{what: "0.5"})


# --------------------------------------------------------------------------------------
# QK-Clip
# --------------------------------------------------------------------------------------

LOGITS = np.array([50.0, 100.0, 400.0, 1e30], np.float32)


def heads(rng, count, dtype=np.float32):
    return rng.normal(size=(5, count, 3)).astype(dtype)


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_qk_clip_is_the_equation_also_of_shared_keys(key_heads, alpha):
    rng = np.random.default_rng(0)
    query, key = heads(rng, 4), heads(rng, key_heads)
    found = oc.qk_clip(query, key, LOGITS, 100.0, alpha)
    expected = np_qk_clip(query, key, LOGITS, alpha=alpha)
    helpers.assert_close(found, expected, rtol=2e-6)


@pytest.mark.parametrize("options", [{"threshold": 100.1}, {"alpha": 0.51}])
def test_another_constant_is_another_qk_clip(options):
    rng = np.random.default_rng(0)
    query, key = heads(rng, 4), heads(rng, 2)
    found = oc.qk_clip(query, key, LOGITS)
    assert helpers.is_close(found, np_qk_clip(query, key, LOGITS), 2e-6)
    assert not helpers.is_close(found, np_qk_clip(query, key, LOGITS, **options), 2e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float8_e4m3fn"])
def test_heads_within_the_threshold_come_back_bit_for_bit(dtype):
    rng = np.random.default_rng(0)
    query = {"kernel": jnp.asarray(heads(rng, 4)).astype(dtype), "n": jnp.arange(3)}
    odd = jnp.finfo(dtype).smallest_subnormal
    query["kernel"] = query["kernel"].at[0, 0, 0].set(odd)
    new, empty = oc.qk_clip(query, None, LOGITS)
    assert empty is None
    assert helpers.types(new) == helpers.types(query)
    kept = new["kernel"][:, :2]
    assert helpers.bits(kept) == helpers.bits(query["kernel"][:, :2])
    half = helpers.truth(query["kernel"])[:, 2] / 2
    helpers.assert_close(new["kernel"][:, 2], half)
    assert helpers.bits(new["n"]) == helpers.bits(query["n"])


@pytest.mark.parametrize("logit", [np.nan, np.inf, -np.inf, -500.0, 0.0])
def test_a_logit_that_says_nothing_leaves_its_head(logit):
    rng = np.random.default_rng(0)
    query, key = heads(rng, 2), heads(rng, 2)
    new = oc.qk_clip(query, key, jnp.array([logit, 400.0]))
    assert helpers.bits([x[:, 0] for x in new]) == helpers.bits(
        [query[:, 0], key[:, 0]]
    )
    np.testing.assert_allclose(new[0][:, 1], query[:, 1] / 2, rtol=1e-6)


def test_heads_of_stacked_layers_have_their_own_logits():
    rng = np.random.default_rng(0)
    kernels = np.stack([heads(rng, 4), heads(rng, 4)])
    biases = kernels[:, 0]
    logits = np.stack([LOGITS, LOGITS[::-1]])
    (kernel, bias), _ = oc.qk_clip((kernels, biases), None, logits)
    for i in range(2):
        alone, _ = oc.qk_clip((kernels[i], biases[i]), None, logits[i])
        assert helpers.bits((kernel[i], bias[i])) == helpers.bits(alone)


def logits_of(module, params, x):
    """The largest logit of every head, seen in the middle of Flax's own layer."""
    seen = []

    def attention(query, key, value, **_):
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
        seen.append(jnp.max(logits, axis=(0, 2, 3)))
        return jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(logits), value)

    layer = module.clone(attention_fn=attention)
    out = layer.apply({"params": params}, x)
    np.testing.assert_allclose(out, module.apply({"params": params}, x), rtol=1e-3)
    return seen[0]


def test_after_the_clip_of_a_flax_layer_no_logit_is_above_the_threshold():
    module = nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=16)
    x = jax.random.normal(jax.random.key(0), (2, 6, 8))
    params: Any = module.init(jax.random.key(1), x)["params"]
    biases = jax.random.normal(jax.random.key(2), (2, 4, 4))
    params["query"] = {"kernel": 3 * params["query"]["kernel"], "bias": biases[0]}
    params["key"] = {"kernel": 3 * params["key"]["kernel"], "bias": biases[1]}
    before = logits_of(module, params, x)
    threshold = float(jnp.median(before))
    query, key = jax.jit(oc.qk_clip)(params["query"], params["key"], before, threshold)
    after = logits_of(module, params | {"query": query, "key": key}, x)
    assert (before > threshold).sum() == 2
    np.testing.assert_allclose(after, np.minimum(before, threshold), rtol=1e-5)


def test_each_device_clips_its_own_heads():
    rng = np.random.default_rng(0)
    query, key = heads(rng, 4), heads(rng, 4)
    spec, kinds = P(None, "heads"), (AxisType.Auto,)
    mapped = jax.shard_map(
        oc.qk_clip,
        mesh=jax.make_mesh((4,), ("heads",), kinds, devices=jax.devices()[:4]),
        in_specs=(spec, spec, P("heads")),
        out_specs=(spec, spec),
    )
    found = jax.jit(mapped)(query, key, LOGITS)
    helpers.assert_close(found, oc.qk_clip(query, key, LOGITS))


def ones(*shape):
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": -1.0}, "Expected threshold >= 0, got -1"),
        ({"alpha": 1.5}, "Expected 0 <= alpha <= 1, got 1.5"),
        ({"max_logits": 3.0}, r"one logit per head, .* got an array of shape \(\)"),
        (
            {"max_logits": np.ones(3, np.float32)},
            r"Expected 3 heads .* at 'kernel', .* \(2, 4, 3",
        ),
        (
            {"max_logits": ones(5, 4)},
            r"axis -2 of the query at 'kernel'",
        ),
        (
            {"key": ones(2, 3, 3)},
            r"a divisor of 4 heads .* key at '', .* \(2, 3",
        ),
    ],
)
def test_what_does_not_fit_raises(arguments, message):
    known: dict[str, Any] = {
        "query": {"kernel": ones(2, 4, 3)},
        "key": None,
        "max_logits": ones(4),
    }
    with pytest.raises(ValueError, match=message):
        oc.qk_clip(**(known | arguments))
