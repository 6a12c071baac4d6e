"""A suggested threshold is what it says it is: a share of the weights in a step."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optaxclip

PARAMS = {
    "dense": {"kernel": jnp.full((4, 3), 2.0), "bias": jnp.zeros(3)},
    "head": {"kernel": jnp.full((3, 1), -1.0), "bias": jnp.zeros(1)},
}
NORM = np.sqrt(4 * 12 + 3)
RISING = optax.warmup_cosine_decay_schedule(0.0, 0.1, 30_000, 300_000)
LABELS = {"dense": "frozen", "head": "sgd"}

# Optimizers of one learning rate, and how far they move for each unit of the gradient.
REACHES = {
    "sgd": (optax.sgd(0.1), 0.1),
    "momentum": (optax.sgd(0.1, 0.9), 1.0),
    "nesterov": (optax.sgd(0.1, 0.9, nesterov=True), 1.0),
    "long momentum": (optax.sgd(0.1, 0.99), 10.0),
    "a mean": (optax.chain(optax.ema(0.9), optax.sgd(0.1)), 0.1),
    "momentum of steps": (optax.chain(optax.scale(-0.1), optax.trace(0.9)), 1.0),
    "decay of the weights": (
        optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, 0.9)),
        1.0,
    ),
    "a schedule from 0": (optax.sgd(RISING, 0.9), 1.0),
    "a schedule that falls": (optax.sgd(optax.exponential_decay(0.1, 50, 0.5)), 0.1),
    "injected": (optax.inject_hyperparams(optax.sgd)(RISING, 0.9), 1.0),
    "accumulated": (optax.MultiSteps(optax.sgd(0.1, 0.9), 3), 1.0),
    "accumulated for long": (optax.MultiSteps(optax.sgd(0.1), 100), 0.1),
    "clipped": (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), 0.1),
    "clipped by a rule": (
        optax.chain(
            optaxclip.clip_by_global_norm(optaxclip.thresholds.streaming_quantile()),
            optax.sgd(0.1, 0.9),
        ),
        1.0,
    ),
    "in a guard": (optaxclip.skip_if_nonfinite(optax.sgd(0.1, 0.9)), 1.0),
    "in a guard that sees the loss": (optaxclip.skip_if_spike(optax.sgd(0.1)), 0.1),
    "with a plateau": (
        optax.chain(optax.sgd(0.1, 0.9), optax.contrib.reduce_on_plateau(patience=3)),
        1.0,
    ),
    "with noise": (optax.chain(optax.add_noise(1e-3, 0.5, 0), optax.sgd(0.1)), 0.1),
    "masked": (optax.masked(optax.sgd(0.1), {"dense": True, "head": True}), 0.1),
    "a step that the loss bounds": (optax.polyak_sgd(0.1), 0.1),
}
SLOW = (  # to compile, or like another one
    *("clipped by a rule", "in a guard that sees the loss", "with noise", "injected"),
    *("accumulated for long", "nesterov", "a mean", "a step that the loss bounds"),
    *("adafactor", "lars", "muon", "lion", "rmsprop", "adamw"),
)


def each(names):
    marks = {True: [pytest.mark.thorough], False: []}
    return [pytest.param(name, marks=marks[name in SLOW]) for name in names]


@pytest.mark.parametrize("name", each(REACHES))
def test_a_step_is_a_share_of_the_norm_of_the_params(name):
    optimizer, reach = REACHES[name]
    suggested = optaxclip.suggest_max_norm(optimizer, PARAMS, share=0.1)
    assert isinstance(suggested, float)
    assert suggested == pytest.approx(0.1 * NORM / reach, rel=0.01)


@pytest.mark.parametrize("optimizer", [optax.sgd(0.3, 0.8), optax.sgd(0.02)])
def test_the_longest_step_of_a_run_that_is_clipped_is_that_share(optimizer):
    suggested = optaxclip.suggest_max_norm(optimizer, PARAMS, share=0.07)
    clipped = optax.chain(optaxclip.clip_by_global_norm(suggested), optimizer)

    def step(carry, key):
        params, state = carry
        way = jax.random.normal(key, (3, 1)) / 100
        grads = jax.tree.map(lambda x: 1e4 + jnp.zeros_like(x), params)
        grads["head"]["kernel"] += way
        updates, state = clipped.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), optaxclip.global_norm(updates)

    keys = jax.random.split(jax.random.key(0), 100)
    lengths = jax.lax.scan(step, (PARAMS, clipped.init(PARAMS)), keys)[1]
    assert lengths.max() == pytest.approx(0.07 * NORM, rel=1e-3)


@pytest.mark.parametrize(
    "frozen",
    [
        optax.partition({"frozen": optax.set_to_zero(), "sgd": optax.sgd(0.1)}, LABELS),
        optax.chain(
            optax.sgd(0.1),
            optax.masked(optax.set_to_zero(), {"dense": True, "head": False}),
        ),
    ],
    ids=["partition", "masked"],
)
def test_params_that_are_frozen_do_not_count(frozen):
    suggested = optaxclip.suggest_max_norm(frozen, PARAMS, share=1.0)
    assert suggested == pytest.approx(np.sqrt(3) / 0.1, rel=1e-3)


def test_of_several_learning_rates_the_largest_counts():
    optimizer = optax.partition(
        {"frozen": optax.sgd(0.01), "sgd": optax.sgd(0.5)}, LABELS
    )
    suggested = optaxclip.suggest_max_norm(optimizer, PARAMS, share=1.0)
    assert suggested == pytest.approx(NORM / 0.5, rel=1e-3)


@pytest.mark.parametrize("value", [0.0, 0.01])
def test_params_near_zero_count_as_a_norm_of_one(value):
    params = {"w": jnp.full(4, value)}
    suggested = optaxclip.suggest_max_norm(optax.sgd(0.1), params, share=0.5)
    assert suggested == pytest.approx(0.5 / 0.1, rel=1e-5)


@pytest.mark.parametrize("kind", [jnp.bfloat16, jnp.complex64])
def test_params_of_any_dtype_are_asked_in_32_bits(kind):
    params = {"w": jnp.full(16, 3.0, kind), "count": jnp.array(7), "none": None}
    suggested = optaxclip.suggest_max_norm(optax.sgd(1e-3, 0.9), params)
    assert suggested == pytest.approx(0.03 * 12 / 1e-2, rel=1e-3)


def test_in_64_bits_the_answer_is_the_same(x64):
    params = {"w": jnp.full(16, 3.0)}
    assert params["w"].dtype == jnp.float64
    optimizer = optax.MultiSteps(optax.sgd(optax.linear_schedule(0, 1e-3, 200), 0.9), 2)
    suggested = optaxclip.suggest_max_norm(optimizer, params)
    assert suggested == pytest.approx(0.03 * 12 / 1e-2, rel=0.01)


def test_params_of_flax_are_taken():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    model.kernel[...] = jnp.ones((2, 3))
    boxed = nn.Dense(
        3, kernel_init=nn.with_partitioning(nn.initializers.ones, (None, "x"))
    )
    for params in (nnx.state(model), boxed.init(jax.random.key(0), jnp.ones((1, 2)))):
        suggested = optaxclip.suggest_max_norm(optax.sgd(0.1), params, share=1.0)
        assert suggested == pytest.approx(np.sqrt(6) / 0.1, rel=1e-5)


def test_an_optimizer_with_arrays_of_its_own_is_asked_with_whole_params():
    kernel = jnp.where(jnp.arange(12).reshape(4, 3) == 5, 0.0, 0.1)
    rates = {"dense": {"kernel": kernel, "bias": jnp.full(3, 0.1)}}
    params = {"dense": PARAMS["dense"]}
    optimizer = optax.stateless(
        lambda updates, _: jax.tree.map(lambda u, r: -u * r, updates, rates)
    )
    suggested = optaxclip.suggest_max_norm(optimizer, params, share=1.0)
    assert suggested == pytest.approx(np.sqrt(48) / 0.1, rel=1e-3)


def test_many_leaves_are_told_apart():
    layers = {f"layer_{i}": jnp.full((3, 3), 1.0) for i in range(30)}
    which = {name: str(i % 3) for i, name in enumerate(layers)}
    optimizer = optax.partition(
        {"0": optax.sgd(0.1), "1": optax.sgd(0.01, 0.95), "2": optax.set_to_zero()},
        which,
    )
    suggested = optaxclip.suggest_max_norm(optimizer, layers, share=1.0)
    assert suggested == pytest.approx(np.sqrt(20 * 9) / 0.2, rel=0.01)


@pytest.mark.parametrize(
    "k", [3, pytest.param(40, marks=pytest.mark.thorough)], ids=["seen", "not seen"]
)
def test_many_leaves_that_move_seldom_are_told_apart(k):
    layers = {f"layer_{i}": jnp.full((3, 3), 1.0) for i in range(17)}
    which = {name: str(i % 2) for i, name in enumerate(layers)}
    rising = optax.sgd(optax.linear_schedule(0, 0.9, 500))
    inner = optax.partition({"0": optax.sgd(0.01), "1": rising}, which)
    optimizer = optax.MultiSteps(inner, k)
    suggested = optaxclip.suggest_max_norm(optimizer, layers, share=1.0)
    assert suggested == pytest.approx(np.sqrt(17 * 9) / 0.9, rel=0.01)


ADAMS = {
    "adam": optax.adam(1e-3),
    "adamw": optax.adamw(RISING, weight_decay=0.1),
    "adam with a large eps": optax.adam(1e-3, eps=1e-5),
    "lion": optax.lion(1e-4),
    "sign": optax.sign_sgd(0.1),
    "adafactor": optax.adafactor(1e-2),
    "lars": optax.lars(0.1),
    "muon": optax.contrib.muon(0.02),
    "rmsprop": optax.rmsprop(1e-3),
    "normalized": optax.chain(optaxclip.normalize_by_update_norm(), optax.sgd(0.1)),
}


@pytest.mark.parametrize("name", each(ADAMS))
def test_where_the_size_of_gradients_does_not_matter_a_history_is_needed(name):
    with pytest.raises(ValueError, match=r"steps are as long as.*as with Adam.*Record"):
        optaxclip.suggest_max_norm(ADAMS[name], PARAMS)


def test_then_the_tenth_percentile_of_the_finite_norms_is_suggested():
    norms = np.random.default_rng(0).permutation(np.arange(1.0, 101.0))
    history = {"norm": np.array([np.nan, *norms, np.inf])}
    assert optaxclip.suggest_max_norm(optax.adam(1e-3), PARAMS, history) == 10.0
    widths = np.where(history["norm"] == 7.0, 50, 1)  # steps that a row stands for
    history["width"] = widths
    assert optaxclip.suggest_max_norm(optax.adam(1e-3), PARAMS, history) == 7.0


def test_otherwise_a_history_makes_no_difference():
    history = {"norm": np.full(100, 1e6)}
    bare = optaxclip.suggest_max_norm(optax.sgd(0.1), PARAMS)
    assert optaxclip.suggest_max_norm(optax.sgd(0.1), PARAMS, history) == bare


def test_the_params_and_the_state_in_use_stay_as_they_are():
    optimizer, params = optax.sgd(0.1, 0.9), {"w": jnp.ones(3)}
    state = optimizer.init(params)
    before = jax.tree.map(np.array, (params, state))
    optaxclip.suggest_max_norm(optimizer, params)
    jax.tree.map(np.testing.assert_array_equal, (params, state), before)


def test_strict_shapes_and_dtypes_are_kept(strict_shapes):
    with jax.numpy_dtype_promotion("strict"):
        optimizer = optax.stateless(
            lambda updates, _: jax.tree.map(lambda x: -x, updates)
        )
        suggested = optaxclip.suggest_max_norm(optimizer, PARAMS, share=1.0)
    assert suggested == pytest.approx(NORM, rel=1e-5)
