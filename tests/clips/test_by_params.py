"""Clips by the norm of the weights that they change, against NumPy loops."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import helpers
from helpers import oc
from weight_cases import step

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


RULES: dict[str, tuple[Any, Any]] = {
    "trust_ratio": (oc.clip_by_trust_ratio, np_trust_ratio),
    "clippy": (oc.clippy, np_clippy),
}
every_rule = pytest.mark.parametrize("name", RULES)
SHAPES = {"a": (3, 4), "b": (5,), "c": ()}


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
