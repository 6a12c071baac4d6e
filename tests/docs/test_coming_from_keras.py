"""What the page says of Keras' clips is what Keras does."""

import os
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from helpers import oc

os.environ["KERAS_BACKEND"] = "jax"  # read by the import

import keras
import optax

CLIPS = {
    "clipnorm": oc.clip_by_leaf_norm,
    "global_clipnorm": oc.clip_by_global_norm,
    "clipvalue": oc.clip_by_value,
}
every_clip = pytest.mark.parametrize("argument", CLIPS)


def sgd(**clip):
    return keras.optimizers.SGD(learning_rate=0.01, momentum=0.9, **clip)


def step(grads, **clip):
    """The change of variables by one step of rate 1: the clipped gradients."""
    variables = [keras.Variable(jnp.zeros_like(x)) for x in grads]
    keras.optimizers.SGD(learning_rate=1.0, **clip).apply(grads, variables)
    return [-np.asarray(variable.value) for variable in variables]


@every_clip
def test_the_same_gradients_make_the_same_steps(argument):
    rng = np.random.default_rng(0)
    params: Any = [jnp.ones((5, 3)), jnp.ones(3)]
    variables = [keras.Variable(x) for x in params]
    theirs = sgd(**{argument: 1.0})
    ours = optax.chain(CLIPS[argument](1.0), optax.sgd(0.01, momentum=0.9))
    state = ours.init(params)
    for size in np.geomspace(0.01, 100, 10):
        grads = [
            jnp.asarray(size * rng.normal(size=x.shape), jnp.float32) for x in params
        ]
        theirs.apply(grads, variables)
        updates, state = ours.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    for variable, x in zip(variables, params, strict=True):
        np.testing.assert_allclose(variable.value, x, rtol=1e-6)


@pytest.mark.parametrize(
    "clip", [{"clipnorm": -1.0}, {"clipnorm": 0}, {"clipvalue": 0}], ids=str
)
def test_keras_switches_off_without_a_word(clip):
    grads = [jnp.array([3.0, 4.0])]
    np.testing.assert_array_equal(step(grads, **clip), grads)


def test_keras_takes_one_clip_at_most():
    with pytest.raises(ValueError, match="Only one of"):
        sgd(clipnorm=1.0, clipvalue=1.0)


def test_keras_makes_zeros_and_nan_of_an_infinity():
    grads = [jnp.array([3.0, jnp.inf]), jnp.array([12.0])]
    np.testing.assert_array_equal(step(grads, clipnorm=1.0)[0], [0, jnp.nan])
    np.testing.assert_array_equal(step(grads, clipnorm=1.0)[1], [1])


@pytest.mark.parametrize(
    "argument, found", [("clipnorm", 0), ("global_clipnorm", jnp.nan)]
)
def test_keras_overflows_in_float16(argument, found):
    grads = [jnp.full(1000, 10, jnp.float16)]  # their norm is 316
    np.testing.assert_array_equal(
        step(grads, **{argument: 1.0})[0], np.full(1000, found)
    )


def test_the_default_of_adam_differs():
    assert keras.optimizers.Adam().epsilon == 1e-7
