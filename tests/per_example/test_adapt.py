"""A threshold that moves to a quantile of the norms of examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from example_cases import seen_of
from helpers import oc
from optaxclip import factors


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
