"""What the examples in docstrings take as imported."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import optaxclip


@pytest.fixture(autouse=True)
def names(doctest_namespace):
    """Adds them."""
    doctest_namespace |= {
        "jax": jax,
        "jnp": jnp,
        "nn": nn,
        "optax": optax,
        "optaxclip": optaxclip,
    }
