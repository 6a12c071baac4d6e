"""An optimizer, a rule or a function where another was meant."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers import oc
from mistake_cases import CHAIN, TREE, step
from optaxclip import factors, norms, thresholds


def sgd(clip):
    return optax.chain(clip, optax.sgd(0.1))


# --------------------------------------------------------------------------------------
# An optimizer in the place of a threshold
# --------------------------------------------------------------------------------------


OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "adam": lambda: optax.adam(1e-3),
    "warm-up": lambda: optax.adamw(optax.warmup_cosine_decay_schedule(0, 1, 5, 10)),
    "lion": lambda: optax.lion(1e-3),
    "a chain": lambda: optax.chain(oc.clip_by_global_norm(1.0), optax.adam(1e-3)),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(1e-3),
    "downhill": lambda: optax.scale(-1.0),
    "with a loss": lambda: optax.polyak_sgd(),
    "guarded": lambda: oc.skip_if_nonfinite(optax.adam(1e-3)),
    "ours": lambda: oc.stable_adamw(1e-3),
    "a clip": lambda: oc.clip_by_leaf_norm(1.0),
}

TAKES_A_THRESHOLD = {
    "global norm": lambda x: oc.clip_by_global_norm(x),
    "leaf norm": lambda x: oc.clip_by_leaf_norm(x),
    "group norm": lambda x: oc.clip_by_group_norm(x),
    "block rms": lambda x: oc.clip_by_block_rms(x),
    "clip_by": lambda x: oc.clip_by(norms.leaf_norms, x),
    "mapping": lambda x: oc.clip_by_leaf_norm({"dense": x, "**": 1.0}),
    "singular values": lambda x: oc.clip_singular_values(x),
    "spectral norm": lambda x: oc.clip_by_spectral_norm(x),
    "guard": lambda x: oc.skip_if_spike(optax.sgd(0.1), threshold=x),
    "guard of the loss": lambda x: oc.skip_if_spike(optax.sgd(0.1), None, x),
    "lagged": thresholds.lagged,
    "clipped_history": thresholds.clipped_history,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_is_no_threshold(name):
    with pytest.raises(TypeError, match=rf"to be a rule, which.*{CHAIN}"):
        oc.clip_by_global_norm(OPTIMIZERS[name]())


@pytest.mark.parametrize("place", TAKES_A_THRESHOLD)
def test_no_threshold_is_an_optimizer(place):
    with pytest.raises(TypeError, match=rf"makes -0.00\d+ of a norm of 1.*{CHAIN}"):
        TAKES_A_THRESHOLD[place](optax.adam(1e-3))


@pytest.mark.parametrize("name", ["adam", "warm-up", "ours", "a clip"])
def test_an_optimizer_is_no_limit_of_elements(name):
    with pytest.raises(TypeError, match=CHAIN):
        oc.clip_by_value(OPTIMIZERS[name]())
    with pytest.raises(TypeError, match=rf"limit\['dense'\].*{CHAIN}"):
        oc.clip_by_value({"dense": OPTIMIZERS[name]()})


@pytest.mark.parametrize(
    "make",
    [oc.adaptive_grad_clip, oc.zclip, oc.adagc, oc.autoclip, oc.spam_clip, oc.clippy],
)
def test_an_optimizer_is_no_number(make):
    with pytest.raises(TypeError, match=CHAIN):
        make(optax.adam(1e-3))


def test_zero_nonfinite_wraps_nothing():
    with pytest.raises(TypeError, match="It wraps nothing"):
        oc.zero_nonfinite(*[optax.adam(1e-3)])


def rule_of(function):
    """A rule as a user writes one."""

    def update_fn(updates: Any, state: Any, params: Any = None) -> Any:
        return function(updates), state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)


RULES = {
    "relative_to_params": lambda: thresholds.relative_to_params(1, norms.leaf_norms),
    "window_percentile": lambda: thresholds.window_percentile(50.0, 4),
    "streaming_quantile": thresholds.streaming_quantile,
    "mean_plus_std": lambda: thresholds.mean_plus_std(1.0, window=4),
    "lagged": lambda: thresholds.lagged(optax.scale(2.0)),
    "clipped_history": lambda: thresholds.clipped_history(optax.scale(2.0)),
    "z_score": thresholds.z_score,
    "relative_to_mean": thresholds.relative_to_mean,
    "within_band": lambda: thresholds.within_band(0.5, 2.0),
    "mean_over_rms": thresholds.mean_over_rms,
}
OPTAX_RULES = {
    "scale": lambda: optax.scale(0.5),
    "ema": lambda: optax.chain(optax.ema(0.9), optax.scale(3.0)),
    "trace": lambda: optax.trace(0.9),
    "scale_by_adam": lambda: optax.scale_by_adam(),  # a mean over a root mean square
    "schedule": lambda: optax.scale_by_schedule(optax.linear_schedule(0.0, 1.0, 9)),
    "of params": lambda: optax.chain(RULES["relative_to_params"](), optax.scale(2.0)),
    "capped": lambda: optax.chain(optax.ema(0.9), oc.clip_by_value(10.0)),
    "stateless": lambda: optax.stateless(
        lambda sizes, _: jax.tree.map(jnp.sqrt, sizes)
    ),
    "one's own": lambda: rule_of(lambda sizes: 2 * sizes),
}


def test_the_table_has_all_rules():
    every = inspect.getmembers(thresholds, inspect.isfunction)
    ours = {name for name, x in every if x.__module__.startswith("optaxclip")}
    assert set(RULES) == ours


@pytest.mark.parametrize("name", RULES | OPTAX_RULES)
def test_every_rule_is_a_threshold(name):
    rule = (RULES | OPTAX_RULES)[name]()
    step(oc.clip_by_leaf_norm(rule))
    step(oc.clip_by_leaf_norm({"bias": rule, "**": 1.0}))
    thresholds.lagged(rule)


def test_a_rule_with_traced_numbers_is_a_threshold_under_jit():
    def clipped(updates, times):
        rule = optax.chain(optax.ema(0.9), optax.scale(times))
        clip = oc.clip_by_global_norm(rule)
        return clip.update(updates, clip.init(updates))[0]

    found = jax.jit(clipped)(jnp.array([3.0, 4.0]), 0.5)
    np.testing.assert_allclose(found, [1.5, 2.0], rtol=1e-6)
    with pytest.raises(TypeError, match=CHAIN):
        jax.jit(lambda u: oc.clip_by_global_norm(optax.sgd(0.1)).init(u))(jnp.ones(2))


def test_a_rule_of_ones_own_is_not_asked_before_the_first_step():
    asked = []

    def allowed(sizes):
        asked.append(sizes)
        return 0.5 * sizes

    clip = oc.clip_by_global_norm(rule_of(allowed))
    assert asked == []
    step(clip)
    assert [sizes.shape for sizes in asked] == [()]


# --------------------------------------------------------------------------------------
# A rule in the place of a clip
# --------------------------------------------------------------------------------------


WRAPPERS = {
    "chain": sgd,
    "guard": oc.skip_if_nonfinite,
    "u_clip": oc.u_clip,
    "reset_momentum": oc.reset_momentum,
    "masked": lambda rule: optax.masked(rule, {"dense": {"bias": 0, "kernel": 1}}),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_rule_is_no_clip(name, wrapper):
    tx = WRAPPERS[wrapper](RULES[name]())
    message = (
        rf"rule `{name}`.*dict.*clip_by_global_norm\(optaxclip\.thresholds\.{name}"
    )
    with pytest.raises(TypeError, match=message):
        tx.init(TREE)


def test_a_rule_is_no_clip_of_one_matrix():
    with pytest.raises(TypeError, match="A rule is no clip, but the threshold of one"):
        sgd(thresholds.z_score()).init(jnp.ones((3, 2)))


# --------------------------------------------------------------------------------------
# Forgotten calls and swapped arguments
# --------------------------------------------------------------------------------------


NO_NORMS = {
    "group_norms": norms.group_norms,
    "excluding": norms.excluding,
    "z_score": thresholds.z_score,
    "rescale": factors.rescale,
    "clip_by_global_norm": oc.clip_by_global_norm,
    "clip_with_norm": oc.clip_with_norm,
    "adam": optax.adam,
    "ema": optax.ema,
    "ClipState": oc.ClipState,
}
TAKES_A_NORM = {
    "clip_by": lambda norm: oc.clip_by(norm, 1.0),
    "guard": lambda norm: oc.skip_if_spike(optax.sgd(0.1), norm, 1.0),
    "excluding": lambda norm: norms.excluding(norm, "dense"),
    "relative_to_params": lambda norm: thresholds.relative_to_params(0.1, norm),
    "per_example": lambda norm: oc.per_example_clipped_grad(jnp.vdot, 1.0, norm=norm),
}


@pytest.mark.parametrize("name", NO_NORMS)
@pytest.mark.parametrize("place", TAKES_A_NORM)
def test_what_is_no_norm_raises_when_building(name, place):
    with pytest.raises(TypeError, match=rf"a norm.*got '{name}' itself"):
        TAKES_A_NORM[place](NO_NORMS[name])


@pytest.mark.parametrize(
    "norm",
    [
        norms.global_norm,
        norms.leaf_norms,
        norms.leaf_rms,
        norms.unit_norms,
        norms.group_norms(),
        norms.excluding(norms.global_norm, "bias"),
        functools.partial(norms.global_norm, ord=1),
        optax.tree.norm,
        lambda updates: optax.tree.norm(updates),
    ],
)
def test_what_is_a_norm_does_not(norm):
    step(oc.clip_by(norm, 1.0))


RETURNS_NO_NORMS = {
    "a norm": lambda updates: norms.group_norms,
    "text": lambda updates: "5.0",
    "a clip": lambda updates: jax.tree.map(lambda x: optax.adam, updates),
}


@pytest.mark.parametrize("name", RETURNS_NO_NORMS)
def test_a_norm_returns_numbers(name):
    clip = oc.clip_by(RETURNS_NO_NORMS[name], 1.0)
    with pytest.raises(
        TypeError, match=r"norms that are numbers, got.*group_norms\(\)"
    ):
        step(clip)


NO_FACTORS = {
    "global_norm": norms.global_norm,
    "z_score": thresholds.z_score,
    "clip_by": oc.clip_by,
    "GuardState": oc.GuardState,
}


@pytest.mark.parametrize("name", NO_FACTORS)
def test_what_is_no_factor_raises_when_building(name):
    with pytest.raises(TypeError, match=rf"a factor.*got '{name}' itself"):
        oc.clip_by(norms.global_norm, 1.0, NO_FACTORS[name])
    with pytest.raises(TypeError, match=rf"a factor.*got '{name}' itself"):
        oc.per_example_clipped_grad(jnp.vdot, 1.0, factor=NO_FACTORS[name])


@pytest.mark.parametrize("bad", [None, "0.5", [0.5], np.ones(3)], ids=repr)
def test_a_factor_returns_an_array_like_the_norms(bad):
    with pytest.raises(TypeError, match=r"a factor that returns.*factors\.rescale"):
        step(oc.clip_by(norms.leaf_norms, 1.0, lambda sizes, limits: bad))


NO_THRESHOLDS = {
    "z_score": (thresholds.z_score, r"Call it first, `z_score\(\.\.\.\)`"),
    "lagged": (thresholds.lagged, r"Call it first"),
    "adam": (optax.adam, r"Call it first, `adam\(\.\.\.\)`"),
    "constant_schedule": (optax.constant_schedule, r"Call it first"),
    "clip_by_leaf_norm": (oc.clip_by_leaf_norm, r"Call it first"),
    "leaf_norms": (norms.leaf_norms, r"norms.*`clip_by\(norm, threshold, factor\)`"),
    "rescale": (factors.rescale, r"factors.*`clip_by\(norm, threshold, factor\)`"),
    "float": (float, r"Call it first, `float\(\.\.\.\)`"),
}


@pytest.mark.parametrize("name", NO_THRESHOLDS)
@pytest.mark.parametrize("place", [*TAKES_A_THRESHOLD, "value", "number"])
def test_a_function_that_has_to_be_called_is_no_threshold(name, place):
    function, remedy = NO_THRESHOLDS[name]
    others = {"value": oc.clip_by_value, "number": oc.adaptive_grad_clip}
    build = (TAKES_A_THRESHOLD | others)[place]
    with pytest.raises(TypeError, match=rf"got '{name}' itself\. .*{remedy}"):
        build(function)


@pytest.mark.parametrize(
    "build",
    [
        lambda: oc.clip_by(1.0, norms.global_norm),
        lambda: oc.clip_by(norms.global_norm, factors.rescale),
        lambda: oc.clip_by(factors.rescale, 1.0, norms.global_norm),
    ],
    ids=["norm and threshold", "no threshold", "norm and factor"],
)
def test_swapped_arguments_of_clip_by_tell_their_order(build):
    with pytest.raises(TypeError, match=r"`clip_by\(norm, threshold, factor\)`"):
        build()


@pytest.mark.parametrize("make", [oc.u_clip, oc.reset_momentum])
def test_a_wrapper_of_a_function_says_to_call_it(make):
    with pytest.raises(TypeError, match=r"got 'adam' itself\. Call it first"):
        make(optax.adam)


@pytest.mark.parametrize("fun", [oc.clip_by_global_norm, norms.group_norms, optax.adam])
def test_over_axes_of_a_function_that_has_to_be_called_raises(fun):
    with pytest.raises(TypeError, match=r"over_axes\(clip_by_global_norm\(1\.0\)"):
        oc.over_axes(fun, jax.sharding.PartitionSpec())


def test_over_axes_needs_specs():
    with pytest.raises(
        TypeError, match=r"a tree of jax\.sharding\.PartitionSpec, got No"
    ):
        oc.over_axes(oc.clip_by_global_norm(1.0), None)


@pytest.mark.parametrize(
    "labels",
    [{"**": ["a"]}, norms.leaf_norms, {"**": jnp.ones(2)}],
    ids=["lists", "a norm", "arrays"],
)
def test_labels_that_are_none_raise_with_the_path(labels):
    with pytest.raises(TypeError, match=r"labels such as strings.*'dense/bias'"):
        step(oc.clip_by_group_norm(1.0, labels))


@pytest.mark.parametrize("exclude", [None, 3, norms.leaf_norms], ids=type)
def test_exclude_that_is_no_pattern_raises(exclude):
    with pytest.raises(TypeError, match="`exclude` to be a path pattern or several"):
        oc.adaptive_grad_clip(0.1, exclude=exclude)


@pytest.mark.parametrize("clip", [oc.clip_cotangent, oc.clip_cotangent_norm])
def test_a_cotangent_is_that_of_an_array(clip):
    with pytest.raises(TypeError, match=r"`clip_preactivation\(activation, limit\)`"):
        clip(jnp.tanh, 1.0)


@pytest.mark.parametrize("bad", [None, "x", 3.0], ids=repr)
def test_logits_without_an_axis_raise(bad):
    with pytest.raises(ValueError, match=r"`max_logits` with one logit per head"):
        oc.qk_clip(jnp.ones((1, 2, 1)), None, bad)


TAKES_A_STATE = {
    "global_norm": lambda: oc.clip_by_global_norm(1.0),
    "value": lambda: oc.clip_by_value(1.0),
    "guard": lambda: oc.skip_if_nonfinite(optax.sgd(0.1)),
    "zero_nonfinite": oc.zero_nonfinite,
    "u_clip": lambda: oc.u_clip(oc.clip_by_value(1.0)),
    "spectral_norm": lambda: oc.clip_by_spectral_norm(1.0),
}


@pytest.mark.parametrize("name", TAKES_A_STATE)
def test_state_and_params_swapped_tell_their_order(name):
    tx = TAKES_A_STATE[name]()
    state = tx.init(TREE)
    with pytest.raises(
        TypeError, match=r"got dict.*`clip.update\(updates, state, para"
    ):
        tx.update(TREE, TREE, state)
