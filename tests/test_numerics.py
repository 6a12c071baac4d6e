"""Where clipping goes wrong elsewhere, and the right answer for each of these inputs.

Every row says what comes in, what is right (NumPy in float64), and what Optax does with
the same input. Optax's answer is asserted to be wrong as well, on the version that was
measured: without that the table could not be told from a list of easy cases.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import helpers
from helpers import oc
from optaxclip import factors, norms

pytestmark = pytest.mark.usefixtures("strict_shapes")

MEASURED_OPTAX = "0.2.8"

# --------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------


class Case(NamedTuple):
    """One input, the clip with its Optax twin, and the answer by NumPy."""

    updates: Any
    clip: Any
    twin: Any
    expected: Any
    params: Any = None
    rtol: float | None = None  # None: one rounding of the leaf's dtype


def normal(dtype, size, sigma) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.asarray(rng.normal(size=size) * sigma).astype(jnp.dtype(dtype))


def single(values) -> np.ndarray:
    return np.asarray(values, np.float32)


def half(values) -> np.ndarray:
    return np.asarray(values, np.float16)


def by_global_norm(updates, max_norm, **more) -> Case:
    """Expected: the global formula, from the rounded updates, in float64."""
    wide = helpers.truth(updates)
    clipped = helpers.by_label(helpers.every_leaf_together, helpers.constant(max_norm))
    return Case(
        jax.tree.map(jnp.asarray, updates),
        oc.clip_by_global_norm(max_norm),
        optax.clip_by_global_norm(max_norm),
        clipped(wide, wide),
        **more,
    )


def by_block_rms(updates, threshold) -> Case:
    wide = helpers.truth(updates)
    clipped = helpers.by_label(
        helpers.each_leaf, helpers.constant(threshold), size=helpers.rms
    )
    return Case(
        updates,
        oc.clip_by_block_rms(threshold),
        optax.clip_by_block_rms(threshold),
        clipped(wide, wide),
    )


def by_agc(updates, params, clipping) -> Case:
    reference = helpers.by_unit(lambda norm: clipping * np.maximum(norm, 1e-3))
    return Case(
        updates,
        oc.adaptive_grad_clip(clipping),
        optax.adaptive_grad_clip(clipping),
        reference(helpers.truth(updates), helpers.truth(params)),
        params,
    )


def many_leaves(dtype, sizes) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [helpers.random_leaf(rng, (size,), dtype) for size in sizes]


ROWS: dict[str, Callable[[], Case]] = {
    "float32, norm 3.1e19": lambda: by_global_norm(
        {"w": normal("float32", 1000, 1e18)}, 1.0
    ),
    "float32, norm just below the largest number": lambda: by_global_norm(
        {"w": single([2e38, -1e38, 2e38])}, 1.0
    ),
    "float32, finite elements with a norm above the largest number": (
        lambda: by_global_norm({"w": single([3e38, -3e38, 3e38])}, 1.0)
    ),
    "float16, norm 309": lambda: by_global_norm(
        {"w": normal("float16", 1000, 10)}, 1.0
    ),
    "float16, 70 000 ones": lambda: by_global_norm(
        {"w": np.ones(70_000, np.float16)}, 1.0
    ),
    "float16 beside a large float32": lambda: by_global_norm(
        {"half": half([2.0]), "single": single([2e5])}, 1e5
    ),
    "float8, four times 20": lambda: by_global_norm(
        {"w": np.full(4, 20.0).astype(jnp.float8_e4m3fn)}, 1.0
    ),
    "bfloat16, sigma 1e20": lambda: by_global_norm(
        {"w": normal("bfloat16", 1000, 1e20)}, 1.0
    ),
    "float16, a million elements of 1e-4": lambda: by_global_norm(
        {"w": np.full(1_000_000, 1e-4).astype(np.float16)}, 0.05
    ),
    "bfloat16, 700 leaves": lambda: by_global_norm(
        many_leaves("bfloat16", [10] * 700), 1.0
    ),
    "bfloat16, a large leaf before 300 small ones": lambda: by_global_norm(
        many_leaves("bfloat16", [1_000_000] + [1000] * 300), 1.0
    ),
    "bfloat16, a large leaf after 300 small ones": lambda: by_global_norm(
        many_leaves("bfloat16", [1000] * 300 + [1_000_000]), 1.0
    ),
    "float32, sigma 1e-19 clipped to 1 % of the norm": lambda: by_global_norm(
        {"w": normal("float32", 1000, 1e-19)}, 3.1e-20
    ),
    "float32, one infinity": lambda: by_global_norm(
        {"w": single([1.0, np.inf]), "b": single([-2.0])}, 1.0
    ),
    "block rms, float32 1e20": lambda: by_block_rms({"w": jnp.full(4, 1e20)}, 0.5),
    "block rms, float16 300": lambda: by_block_rms(
        {"w": jnp.full(4, 300, jnp.float16)}, 0.5
    ),
    "agc, float32 1e20": lambda: by_agc(
        {"w": jnp.full((4, 2), 1e20)}, {"w": jnp.ones((4, 2))}, 0.5
    ),
    "agc, float16 300": lambda: by_agc(
        {"w": jnp.full((4, 2), 300, jnp.float16)},
        {"w": jnp.ones((4, 2), jnp.float16)},
        0.5,
    ),
    "agc, a tiny gradient of a zero parameter": lambda: by_agc(
        {"w": jnp.array([1e-8])}, {"w": jnp.array([0.0])}, 1e-7
    ),
}
every_row = pytest.mark.parametrize("row", ROWS)


@every_row
def test_the_table_has_the_right_answer(row):
    case = ROWS[row]()
    clipped, _ = case.clip.update(
        case.updates, case.clip.init(case.updates), case.params
    )
    helpers.assert_close(clipped, case.expected, rtol=case.rtol)


@every_row
def test_the_table_holds_what_optax_gets_wrong(row):
    case = ROWS[row]()
    clipped, _ = case.twin.update(
        case.updates, case.twin.init(case.updates), case.params
    )
    wrong = not helpers.is_close(clipped, case.expected, rtol=4e-3)
    assert wrong or optax.__version__ != MEASURED_OPTAX


def test_the_table_in_float64(x64):
    case = by_global_norm({"w": np.array([3e200, 4e200])}, 1.0)
    ours, _ = case.clip.update(case.updates, None)
    optaxs, _ = case.twin.update(case.updates, None)
    np.testing.assert_allclose(ours["w"], [0.6, 0.8], rtol=1e-15)
    zeroed = not np.asarray(optaxs["w"]).any()
    assert zeroed or optax.__version__ != MEASURED_OPTAX


# Faults of another kind than a wrong number: `(ours is right, Optax's is wrong)`.


def through_the_clip(clip):
    """The derivative of a loss behind a clip, at a gradient of zero."""

    def loss(u):
        return jnp.sum(clip.update({"w": u}, optax.EmptyState())[0]["w"])

    return jax.grad(loss)(jnp.zeros(3))


def test_the_derivative_at_zero_is_finite_and_optaxs_is_not():
    ours = through_the_clip(oc.clip_by_global_norm(1.0))
    np.testing.assert_array_equal(ours, np.ones(3))
    optaxs = through_the_clip(optax.clip_by_global_norm(1.0))
    assert np.isnan(optaxs).all() or optax.__version__ != MEASURED_OPTAX


def test_a_negative_threshold_raises_where_optax_flips_the_sign():
    with pytest.raises(ValueError, match=r"-1"):
        oc.clip_by_global_norm(-1.0)
    twin: Any = optax.clip_by_global_norm(-1.0)
    flipped, _ = twin.update(jnp.array([3.0, 4.0]), optax.EmptyState())
    assert flipped[0] < 0 or optax.__version__ != MEASURED_OPTAX


def test_a_float32_threshold_keeps_bfloat16_updates_where_optax_fails():
    updates = {"w": jnp.array([3.0, 4.0], jnp.bfloat16)}
    max_norm = jnp.asarray(1.0, jnp.float32)
    clipped, _ = oc.clip_by_global_norm(max_norm).update(updates, None)
    assert clipped["w"].dtype == jnp.bfloat16
    helpers.assert_close(clipped, {"w": np.array([0.6, 0.8])})
    if optax.__version__ == MEASURED_OPTAX:
        with pytest.raises(TypeError):
            optax.clip_by_global_norm(max_norm).update(updates, optax.EmptyState())


def test_integer_leaves_are_untouched_where_optax_fails():
    updates = {"w": jnp.array([3.0, 4.0]), "n": jnp.array([7, -7])}
    clipped, _ = oc.clip_by_global_norm(1.0).update(updates, None)
    assert clipped["n"] is updates["n"]
    np.testing.assert_allclose(clipped["w"], [0.6, 0.8], rtol=1e-6)
    if optax.__version__ == MEASURED_OPTAX:
        with pytest.raises(TypeError):
            optax.clip_by_global_norm(1.0).update(updates, optax.EmptyState())


def test_complex_leaves_are_clipped_by_modulus_where_optax_fails():
    updates = jnp.array([3.0 + 4.0j, 0.1j])
    clipped, _ = oc.clip(1.0).update(updates, None)
    np.testing.assert_allclose(clipped, [0.6 + 0.8j, 0.1j], rtol=1e-6)
    if optax.__version__ == MEASURED_OPTAX:
        with pytest.raises(ValueError, match=r"[cC]omplex"):
            optax.clip(1.0).update(updates, optax.EmptyState())


# --------------------------------------------------------------------------------------
# Hundreds of leaves, any order
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_norm_of_hundreds_of_leaves_is_exact_in_any_order(dtype, seed):
    sizes = np.random.default_rng(seed).permutation([1] * 200 + [50] * 100 + [30_000])
    leaves = many_leaves(dtype, sizes)
    exact = helpers.vector_norm(helpers.truth(leaves))
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
    exact = helpers.vector_norm([values.astype(np.float64)])
    norm = float(jax.jit(norms.global_norm)(as_leaves(values)))
    if exact > FLOAT32_MAX:
        assert norm == np.inf or norm >= FLOAT32_MAX * (1 - 1e-6)
    else:
        np.testing.assert_allclose(norm, exact, rtol=1e-6)


@hypothesis.given(flat_updates(), ratios)
def test_property_the_result_is_the_formula_in_float64(case, ratio):
    dtype, values = case
    wide = values.astype(np.float64)
    exact = helpers.vector_norm([wide])
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
    exact = helpers.vector_norm([values.astype(np.float64)])
    max_norm = float(np.float32(min(ratio * exact, FLOAT32_MAX)))
    hypothesis.assume(usable(max_norm))
    clipped, _ = clipped_and_norm(values, max_norm)
    size = helpers.vector_norm([clipped.astype(np.float64)])
    relative, absolute = helpers.tolerance(dtype)
    slack = absolute * np.sqrt(values.size)
    assert size <= max_norm * (1 + relative) + slack
    # The other side, which alone can see an update that was zeroed.
    if dtype in WIDE:
        assert size >= min(max_norm, exact) * (1 - relative)


@hypothesis.given(flat_updates(), st.sampled_from([1.001, 3.0, 1e3]))
def test_property_what_needs_no_clipping_is_untouched(case, ratio):
    _, values = case
    exact = helpers.vector_norm([values.astype(np.float64)])
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


@hypothesis.given(flat_updates(), ratios)
def test_property_a_cotangent_is_clipped_like_an_update(case, ratio):
    _, values = case
    exact = helpers.vector_norm([values.astype(np.float64)])
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
    exact = helpers.vector_norm([values.astype(np.float64)])
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
    max_norm = np.float32(ratio * helpers.vector_norm([values.astype(np.float64)]))
    plain, _ = clipped_and_norm(values, max_norm)
    factor = 2.0**power
    scaled, _ = clipped_and_norm(
        (values * factor).astype(np.float32), max_norm * factor
    )
    np.testing.assert_allclose(
        scaled.astype(np.float64) / factor, plain.astype(np.float64), rtol=1e-6
    )


# --------------------------------------------------------------------------------------
# Single cases that a random draw would miss
# --------------------------------------------------------------------------------------


def test_an_overflowing_true_norm_is_reported_as_infinite_and_clipped_exactly():
    updates = jnp.full((4,), 3e38)
    clip = oc.clip_by_global_norm(1.0)
    clipped, state = clip.update(updates, clip.init(updates))
    np.testing.assert_allclose(clipped, [0.5] * 4, rtol=1e-6)
    assert np.isfinite(state.norms)
    assert oc.summary(state)["clip/norm"] == np.inf


def test_a_factor_below_the_smallest_number_is_applied_exactly():
    updates = jnp.array([3e38, 0.0])
    clipped, _ = oc.clip_by_global_norm(3e-10).update(updates, None)
    np.testing.assert_allclose(clipped, [3e-10, 0.0], rtol=1e-6)


@functools.cache
def norm_of_order(norm, ord):
    """The same function each time, so that it is compiled once."""
    return lambda updates: norm(updates, ord=ord)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("ord", [1, 1.5, 3, 100, float("inf")])
@pytest.mark.parametrize(
    "norm", [norms.global_norm, norms.leaf_norms, norms.unit_norms]
)
def test_every_norm_is_rescued(norm, ord, scale):
    updates = {"w": jnp.array([3.0, -4.0]) * scale}
    clip = oc.clip_by(norm_of_order(norm, ord), scale)
    clipped, _ = clip.update(updates, clip.init(updates))
    size = helpers.vector_norm([np.array([3.0, 4.0])], ord=ord)
    np.testing.assert_allclose(
        clipped["w"], np.array([3.0, -4.0]) * (scale / size), rtol=1e-6
    )


# Every factor at updates of norm 5 and a threshold of 1, times any scale.
FACTORS = {
    "rescale": (factors.rescale, 0.2),
    "normalize": (factors.normalize, 0.2),
    "drop": (factors.drop, 0.0),
    "soften": (factors.soften, 1 / 6),
}


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30, 6e37])
@pytest.mark.parametrize("name", FACTORS)
def test_every_factor_depends_on_the_ratio_alone(name, scale):
    factor, expected = FACTORS[name]
    updates = jnp.array([3.0, -4.0]) * scale
    clip = oc.clip_by(norms.global_norm, scale, factor=factor)
    clipped, state = clip.update(updates, clip.init(updates))
    right = np.array([3.0, -4.0]) * expected * scale
    np.testing.assert_allclose(clipped, right, rtol=1e-6)
    np.testing.assert_allclose(state.factors, expected, rtol=1e-6)


def test_a_threshold_near_the_largest_number_is_exact():
    updates = jnp.full((4,), 3e38)  # norm 6e38
    clipped, _ = oc.clip_by_global_norm(3e38).update(updates, None)
    np.testing.assert_allclose(clipped, [1.5e38] * 4, rtol=1e-6)


def test_normalize_by_update_norm_is_exact_over_the_whole_range():
    clip = oc.normalize_by_update_norm()
    large, _ = clip.update(jnp.full((4,), 3e38), None)
    np.testing.assert_allclose(large, [0.5] * 4, rtol=1e-6)
    half, _ = clip.update(jnp.full((4,), 300, jnp.float16), None)
    np.testing.assert_allclose(half, [0.5] * 4, rtol=1e-3)
    small, _ = clip.update(jnp.array([3e-30, 4e-30]), None)  # eps is 1e-6
    np.testing.assert_allclose(small, [3e-24, 4e-24], rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_derivative_is_right_over_the_whole_range(scale):
    def first(updates):
        return oc.clip_by_global_norm(scale).update(updates, None)[0][0]

    # Of 3 t / norm at (3, 4): t / norm - 9 t / norm^3, and -12 t / norm^3.
    gradient = jax.grad(first)(jnp.array([3.0, 4.0]) * scale)
    np.testing.assert_allclose(gradient, [0.128, -0.096], rtol=1e-5)


def test_derivatives_can_be_vmapped_and_taken_forwards():
    def total(updates):
        return jnp.sum(oc.clip_by_global_norm(1.0).update(updates, None)[0])

    batch = jnp.array([[3.0, 4.0], [0.0, 0.0], [0.1, 0.2]])
    expected = [[0.032, -0.024], [1.0, 1.0], [1.0, 1.0]]
    backwards = jax.jit(jax.vmap(jax.grad(total)))(batch)
    np.testing.assert_allclose(backwards, expected, rtol=1e-5)
    forwards = jax.jit(jax.vmap(jax.jacfwd(total)))(batch)
    np.testing.assert_allclose(forwards, expected, rtol=1e-5)


def users_norm(updates):
    """A norm as anyone would write it, with squares that overflow."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(updates)))


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 3e37])
def test_a_users_own_norm_is_rescued_too(scale):
    updates = {"a": jnp.array([3.0]) * scale, "b": jnp.array([-4.0]) * scale}
    clip = oc.clip_by(users_norm, scale)
    clipped, state = clip.update(updates, clip.init(updates))
    np.testing.assert_allclose(clipped["a"], [0.6 * scale], rtol=1e-6)
    np.testing.assert_allclose(clipped["b"], [-0.8 * scale], rtol=1e-6)
    np.testing.assert_allclose(state.norms, 5 * scale, rtol=1e-6)


def test_a_users_own_norm_of_float16_updates_is_rescued_too():
    updates = jnp.full((1000,), 300.0, jnp.float16)
    clip = oc.clip_by(users_norm, 1.0)
    clipped, _ = clip.update(updates, clip.init(updates))
    helpers.assert_close(clipped, np.full(1000, 1 / np.sqrt(1000)))


def test_scopes_of_very_different_size_are_each_rescued():
    updates = {"big": jnp.array([3e30, 4e30]), "small": jnp.array([3e-30, -4e-30])}
    clip = oc.clip_by_leaf_norm({"big": 1.0, "small": 1e-30})
    clipped, state = clip.update(updates, clip.init(updates))
    np.testing.assert_allclose(clipped["big"], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(clipped["small"], [6e-31, -8e-31], rtol=1e-6)
    np.testing.assert_allclose(state.norms, [5e30, 5e-30], rtol=1e-6)


def test_a_zero_leaf_beside_others_has_norm_zero():
    updates = {"dead": jnp.zeros(3), "live": jnp.array([3.0, 4.0])}
    clip = oc.clip_by_leaf_norm(1.0)
    clipped, state = clip.update(updates, clip.init(updates))
    np.testing.assert_array_equal(clipped["dead"], np.zeros(3))
    np.testing.assert_array_equal(state.norms, [0.0, 5.0])


def test_float64_thresholds_are_not_rounded_to_float32(x64):
    updates = {"w": jnp.array([3.0, 4.0])}
    clipped, _ = oc.clip_by_global_norm(0.1).update(updates, None)
    np.testing.assert_allclose(clipped["w"], [0.06, 0.08], rtol=1e-15)
    clipped, _ = oc.clip_by_value(0.1).update(updates, None)
    np.testing.assert_array_equal(clipped["w"], [0.1, 0.1])


def test_float64_norms_are_recorded_in_float64(x64):
    updates = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([1e-9], jnp.float32)}
    clip = oc.clip_by_leaf_norm(0.1)
    _, state = clip.update(updates, clip.init(updates))
    assert state.norms.dtype == state.max_norms.dtype == jnp.float64
    np.testing.assert_allclose(state.max_norms, [0.1, 0.1], rtol=1e-15)


@pytest.mark.parametrize("size", [1e-300, 1.0, 1e300])
def test_complex128_is_measured_and_clipped_in_its_own_precision(size, x64):
    third = size / 3
    alone = {"z": jnp.array([third * (1 + 2j), third * 2j])}
    clipped, _ = oc.clip_by_global_norm(third).update(alone, None)
    assert clipped["z"].dtype == jnp.complex128
    right = np.array([third * (1 + 2j), third * 2j]) / 3
    np.testing.assert_allclose(clipped["z"], right, rtol=1e-14)
    mixed = alone | {"w": jnp.array([0.5], jnp.float32)}
    leaf_norms = norms.leaf_norms(mixed)
    assert {x.dtype for x in leaf_norms.values()} == {jnp.dtype("float64")}
    np.testing.assert_allclose(leaf_norms["z"], size, rtol=1e-14)


@pytest.mark.parametrize("norm", [norms.global_norm, norms.leaf_norms])
@pytest.mark.parametrize(
    "factor", [factors.rescale, factors.normalize, factors.drop, factors.soften]
)
def test_a_traced_nan_as_the_threshold_is_not_hidden(factor, norm):
    def step(updates, max_norm):
        return oc.clip_by(norm, max_norm, factor).update(updates, None)[0]

    updates = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([1e-3])}
    clipped = jax.jit(step)(updates, jnp.nan)
    assert all(np.isnan(x).all() for x in clipped.values())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_a_non_finite_leaf_spoils_its_own_scope_alone(bad):
    updates = {"a": jnp.array([bad, 1.0]), "b": jnp.array([3.0, 4.0])}
    clip = oc.clip_by_leaf_norm(1.0)
    clipped, state = clip.update(updates, clip.init(updates))
    assert np.isnan(clipped["a"]).all()
    np.testing.assert_allclose(clipped["b"], [0.6, 0.8], rtol=1e-6)
    assert not np.isfinite(state.norms[0])
    np.testing.assert_allclose(state.norms[1], 5.0, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("max_norm", [jnp.zeros(()), 1.0, jnp.asarray(jnp.inf)])
def test_no_threshold_hides_a_non_finite_update(max_norm, bad):
    updates = {"a": jnp.array([bad, 1.0]), "b": jnp.array([3.0])}
    clipped, _ = oc.clip_by_global_norm(max_norm).update(updates, None)
    assert np.isnan(clipped["a"]).all()
    assert np.isnan(clipped["b"]).all()


def test_a_traced_negative_threshold_counts_as_zero():
    def step(max_norm):
        updates = jnp.array([3.0, 4.0])
        return (
            oc.clip_by_global_norm(max_norm).update(updates, None)[0],
            oc.clip_by_value(max_norm).update(updates, None)[0],
        )

    for clipped in jax.jit(step)(-1.0):
        np.testing.assert_array_equal(clipped, [0.0, 0.0])


def test_a_traced_nan_threshold_makes_its_scope_nan():
    def step(max_norm):
        updates = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
        limits = {"a": max_norm, "b": 1.0}
        return oc.clip_by_leaf_norm(limits).update(updates, None)[0]

    clipped = jax.jit(step)(float("nan"))
    assert np.isnan(clipped["a"]).all()
    np.testing.assert_array_equal(clipped["b"], [1.0])


# --------------------------------------------------------------------------------------
# Every norm with every threshold
# --------------------------------------------------------------------------------------


def at_least_a_tenth(norms, max_norms):
    return jnp.maximum(0.1, max_norms / norms)


def root_of_rescale(norms, max_norms):
    return jnp.sqrt(factors.rescale(norms, max_norms))


@pytest.mark.parametrize("size", [1e3, 1e20, 1e30, 1e37])
def test_a_factor_of_ones_own_is_not_taken_for_a_ratio(size):
    update = jnp.array([0.6, 0.8]) * size
    for factor, right in (at_least_a_tenth, 0.1), (root_of_rescale, size**-0.5):
        clipped, _ = oc.clip_by(norms.global_norm, 1.0, factor).update(update, None)
        np.testing.assert_allclose(clipped, update * right, rtol=1e-5)


EVERY_FACTOR = {
    "rescale": (factors.rescale, helpers.np_rescale),
    "normalize": (factors.normalize, helpers.np_normalize),
    "soften": (factors.soften, helpers.np_soften),
}


@pytest.mark.parametrize("factor", EVERY_FACTOR)
def test_every_norm_meets_every_threshold(factor):
    """Factors down to 1e-75, which no float32 holds, of norms from 1e-37 to 1e38."""
    ours, reference = EVERY_FACTOR[factor]
    sizes = np.array([1e-37, 1e-30, 1e-25, 1e-20, 1e-9, 1, 1e9, 1e20, 1e30, 1e38])
    limits = np.array([1e-37, 1e-30, 1e-25, 1e-18, 1e-9, 1, 1e9, 1e18, 1e30, np.inf])
    limits = limits[: None if factor == "rescale" else -1]
    direction = np.array([0.6, -0.48, 0.64])

    def clipped(size, limit):
        update = size * jnp.asarray(direction, jnp.float32)
        return oc.clip_by(norms.global_norm, limit, ours).update(update, None)[0]

    every = jax.vmap(jax.vmap(clipped, (None, 0)), (0, None))
    found = jax.jit(every)(jnp.float32(sizes), jnp.float32(limits))
    exact = reference(sizes[:, None], limits)
    expected = (exact * sizes[:, None])[..., None] * direction
    in_range = exact < 3e38
    smallest = float(jnp.finfo(jnp.float32).smallest_normal)
    np.testing.assert_allclose(
        helpers.truth(found)[in_range], expected[in_range], rtol=1e-6, atol=smallest
    )
