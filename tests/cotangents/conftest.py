"""A batch of sequences, and the params of the linen model."""

import jax
import pytest

from networks import BATCH, INPUTS, STEPS, Linen


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (BATCH, STEPS, INPUTS))


@pytest.fixture(scope="module")
def params(x):
    return Linen().init(jax.random.key(0), x)
