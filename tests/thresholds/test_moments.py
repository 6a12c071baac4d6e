"""Running means keep their digits, whatever the weights and the sizes."""

import jax.numpy as jnp
import numpy as np
import pytest

from optaxclip._thresholds import moments as _moments

WEIGHTS = [0.0, 1e-6, 0.3, 0.49, 0.5, 0.7, 1 - 1e-6, 1.0]
PAIRS = [(1.0, 1e-6), (1e-6, 1.0), (2.0, 3.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)]
every = pytest.mark.parametrize(("old", "new"), PAIRS)


@every
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e38])
def test_a_mean_is_that_of_float64(old, new, weight, scale):
    x, y, w = (np.float32(z) for z in (scale * old, scale * new, weight))
    right = (1 - np.float64(w)) * np.float64(x) + np.float64(w) * np.float64(y)
    ours = _moments.mean(jnp.asarray(x), jnp.asarray(y), jnp.asarray(w))
    np.testing.assert_allclose(ours, right, rtol=1e-6)


@every
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e38])
def test_a_root_mean_square_is_that_of_float64(old, new, weight, scale):
    x, y, w = (np.float32(z) for z in (scale * old, scale * new, weight))
    squares = np.float64(x) ** 2, np.float64(y) ** 2
    right = np.sqrt((1 - np.float64(w)) * squares[0] + np.float64(w) * squares[1])
    ours = _moments.root_mean_square(*(jnp.asarray(z) for z in (x, y, w)))
    np.testing.assert_allclose(ours, right, rtol=1e-6)
