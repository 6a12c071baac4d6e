"""Properties of random updates of every dtype and magnitude, against float64."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
import in_numpy
from helpers import oc
from numeric_cases import many_leaves
from optaxclip import norms

pytestmark = pytest.mark.usefixtures("strict_shapes")


# --------------------------------------------------------------------------------------
# Hundreds of leaves, any order
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, helpers.thorough(1)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_norm_of_hundreds_of_leaves_is_exact_in_any_order(dtype, seed):
    sizes = np.random.default_rng(seed).permutation([1] * 200 + [50] * 100 + [30_000])
    leaves = many_leaves(dtype, sizes)
    exact = in_numpy.vector_norm(helpers.truth(leaves))
    norm = norms.global_norm([jnp.asarray(x) for x in leaves])
    assert norm.dtype == jnp.float32
    np.testing.assert_allclose(norm, exact, rtol=1e-6)


def test_a_long_vector_of_ones_is_counted_exactly():
    # A running float32 sum of ones stops at 2 ** 24: it must be summed in a tree.
    ones = {"w": jnp.ones(3 * 2**24, jnp.bfloat16)}
    np.testing.assert_allclose(norms.global_norm(ones), np.sqrt(3 * 2**24), rtol=1e-6)


# --------------------------------------------------------------------------------------
# Properties, against float64
# --------------------------------------------------------------------------------------


LEAVES = 100
# Powers of ten of the elements that each format holds without subnormal numbers.
MAGNITUDES = {
    "float32": (-37, 37),
    "bfloat16": (-37, 37),
    "float16": (-4, 3),
    "float8_e4m3fn": (-1, 1),
}
kinds = st.sampled_from(sorted(MAGNITUDES))


@st.composite
def flat_updates(draw):
    """`(dtype, values)`: elements between 1 and 10 times one to three magnitudes."""
    dtype = draw(kinds)
    low, high = MAGNITUDES[dtype]
    powers = draw(st.lists(st.integers(low, high), min_size=1, max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = 10.0 ** rng.choice(powers, size=2 * LEAVES)
    size = rng.uniform(1, 9.9, size=2 * LEAVES) * scale
    sign = rng.choice([-1.0, 0.0, 1.0], size=2 * LEAVES, p=[0.45, 0.1, 0.45])
    limit = float(jnp.finfo(dtype).max)
    return dtype, np.clip(size * sign, -limit, limit).astype(jnp.dtype(dtype))


def as_leaves(values):
    return [jnp.asarray(x) for x in np.split(values, LEAVES)]


@jax.jit
def clip_to(leaves, max_norm):
    clip = oc.clip_by_global_norm(max_norm)
    clipped, state = clip.update(leaves, clip.init(leaves))
    return jnp.concatenate(clipped), state.norms


def clipped_and_norm(values, max_norm):
    clipped, norm = clip_to(as_leaves(values), jnp.float32(max_norm))
    return np.asarray(clipped), float(norm)


ratios = st.sampled_from([0.01, 0.3, 0.999, 1.001, 100.0])
FLOAT32_MAX = float(jnp.finfo(jnp.float32).max)
FLOAT32_TINY = float(jnp.finfo(jnp.float32).tiny)


def usable(max_norm) -> bool:
    return 1e-30 < max_norm < FLOAT32_MAX


@hypothesis.given(flat_updates())
def test_property_the_norm_is_within_a_millionth(case):
    _, values = case
    exact = in_numpy.vector_norm([values.astype(np.float64)])
    norm = float(jax.jit(norms.global_norm)(as_leaves(values)))
    if exact > FLOAT32_MAX:
        assert norm == np.inf or norm >= FLOAT32_MAX * (1 - 1e-6)
    else:
        np.testing.assert_allclose(norm, exact, rtol=1e-6)


@hypothesis.given(flat_updates(), ratios)
def test_property_the_result_is_the_formula_in_float64(case, ratio):
    dtype, values = case
    wide = values.astype(np.float64)
    exact = in_numpy.vector_norm([wide])
    max_norm = float(np.float32(min(ratio * exact, FLOAT32_MAX)))
    hypothesis.assume(usable(max_norm))
    clipped, _ = clipped_and_norm(values, max_norm)
    relative, absolute = helpers.tolerance(dtype)
    # A result below the smallest normal number may be flushed to zero.
    absolute = max(absolute, float(jnp.finfo(dtype).tiny) if dtype in WIDE else 0)
    np.testing.assert_allclose(
        clipped.astype(np.float64),
        wide * min(1.0, max_norm / exact) if exact else wide,
        rtol=relative,
        atol=absolute,
    )


WIDE = ("float32", "bfloat16")


@hypothesis.given(flat_updates(), ratios)
def test_property_the_norm_of_the_result_is_at_most_the_threshold(case, ratio):
    dtype, values = case
    exact = in_numpy.vector_norm([values.astype(np.float64)])
    max_norm = float(np.float32(min(ratio * exact, FLOAT32_MAX)))
    hypothesis.assume(usable(max_norm))
    clipped, _ = clipped_and_norm(values, max_norm)
    size = in_numpy.vector_norm([clipped.astype(np.float64)])
    relative, absolute = helpers.tolerance(dtype)
    slack = absolute * np.sqrt(values.size)
    assert size <= max_norm * (1 + relative) + slack
    # The other side, which alone can see an update that was zeroed.
    if dtype in WIDE:
        assert size >= min(max_norm, exact) * (1 - relative)


@hypothesis.given(flat_updates(), st.sampled_from([1.001, 3.0, 1e3]))
def test_property_what_needs_no_clipping_is_untouched(case, ratio):
    _, values = case
    exact = in_numpy.vector_norm([values.astype(np.float64)])
    hypothesis.assume(usable(ratio * exact))
    clipped, norm = clipped_and_norm(values, ratio * exact)
    assert clipped.tobytes() == values.tobytes()
    np.testing.assert_allclose(norm, exact, rtol=1e-6)


@jax.jit
def clip_cotangents(cotangents, limit):
    """By norm and by value, with the norm that the statistics report."""

    def tapped(x, stats):
        by_norm = oc.clip_cotangent_norm(x, limit, stats=stats)
        return by_norm, oc.clip_cotangent(x, limit)

    pull = jax.vjp(tapped, cotangents, oc.cotangent_stats())[1]
    zeros = jax.tree.map(jnp.zeros_like, cotangents)
    by_norm, stats = pull((cotangents, zeros))
    by_value, _ = pull((zeros, cotangents))
    return jnp.concatenate(by_norm), jnp.concatenate(by_value), stats.norms


@pytest.mark.thorough
@hypothesis.given(flat_updates(), ratios)
def test_property_a_cotangent_is_clipped_like_an_update(case, ratio):
    _, values = case
    exact = in_numpy.vector_norm([values.astype(np.float64)])
    limit = float(np.float32(min(ratio * exact, FLOAT32_MAX)))
    hypothesis.assume(usable(limit) and exact < FLOAT32_MAX)
    by_norm, by_value, norm = clip_cotangents(as_leaves(values), jnp.float32(limit))
    expected, _ = clipped_and_norm(values, limit)
    np.testing.assert_array_equal(by_norm, expected)
    bounded = np.clip(values.astype(np.float32), -limit, limit).astype(values.dtype)
    np.testing.assert_array_equal(by_value, bounded)
    np.testing.assert_allclose(norm, exact, rtol=1e-6)


@hypothesis.given(flat_updates(), ratios)
def test_property_clipping_twice_is_clipping_once(case, ratio):
    dtype, values = case
    exact = in_numpy.vector_norm([values.astype(np.float64)])
    max_norm = float(np.float32(min(ratio * exact, FLOAT32_MAX)))
    hypothesis.assume(usable(max_norm))
    once, _ = clipped_and_norm(values, max_norm)
    twice, _ = clipped_and_norm(once, max_norm)
    relative, absolute = helpers.tolerance(dtype)
    np.testing.assert_allclose(
        twice.astype(np.float64),
        once.astype(np.float64),
        rtol=2 * relative,
        atol=2 * max(absolute, FLOAT32_TINY if dtype in WIDE else 0),
    )


@hypothesis.given(st.integers(0, 2**32 - 1), ratios, st.integers(-110, 110))
def test_property_a_power_of_two_passes_through_exactly(seed, ratio, power):
    values = np.random.default_rng(seed).uniform(1, 2, 2 * LEAVES).astype(np.float32)
    max_norm = np.float32(ratio * in_numpy.vector_norm([values.astype(np.float64)]))
    plain, _ = clipped_and_norm(values, max_norm)
    factor = 2.0**power
    scaled, _ = clipped_and_norm(
        (values * factor).astype(np.float32), max_norm * factor
    )
    np.testing.assert_allclose(
        scaled.astype(np.float64) / factor, plain.astype(np.float64), rtol=1e-6
    )
