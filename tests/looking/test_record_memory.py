"""A record of fixed size holds what its definition says, at every step of a run."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import record_reference as reference
from optaxclip._looking import stretches


@functools.cache
def run_of(size, columns=2):
    """Returns a compiled run, with the memory and counts after each of its steps."""

    def body(carry, step):
        memory, seen = stretches.after(carry[0], carry[1], step[0], step[1])
        return (memory, seen), (memory, seen)

    start = stretches.empty(size, columns, jnp.float32), jnp.zeros(2, jnp.int32)

    @jax.jit
    def run(values, flags, carry=start):
        return jax.lax.scan(body, carry, (values, flags))

    return run


def drawn_run(length, seed=0, bad=0.0):
    """Random values, two a step, and flags; a bad step has a NaN or an infinity."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(length, 2)).astype(np.float32)
    flags = rng.random((length, 3)) < (0.2, 0.5, bad)
    rows = np.flatnonzero(flags[:, 2])
    broken = rng.choice([np.nan, np.inf, -np.inf], rows.size)
    values[rows, rng.integers(0, 2, rows.size)] = broken
    return values, flags


def as_steps(values, flags):
    return [
        {"step": i, "values": x, "skipped": y[0], "clipped": y[1], "nonfinite": y[2]}
        for i, (x, y) in enumerate(zip(values, flags, strict=True))
    ]


def assert_holds(memory, kept, steps):
    expected = reference.history(steps, memory.shape[1])
    past, last = stretches.in_order(memory, int(kept))
    drawn, largest = map(np.concatenate, zip(past, last, strict=True))
    assert len(drawn) == len(expected)
    np.testing.assert_array_equal(stretches.steps(drawn), [x["step"] for x in expected])
    np.testing.assert_array_equal(drawn[:, :2], [x["values"] for x in expected])
    for i, key in enumerate(reference.COUNTS):
        np.testing.assert_array_equal(drawn[:, i - 4], [x[key] for x in expected])
    finite = np.where(largest > stretches.none(np.float32), largest, np.nan)
    np.testing.assert_array_equal(finite[:, :2], [x["largest"] for x in expected])


def assert_run_holds(size, values, flags, every=1):
    _, (memories, seen) = run_of(size)(values, flags)
    memories, seen = np.asarray(memories), np.asarray(seen)
    steps = as_steps(values, flags)
    for n in range(len(steps) - 1, -1, -every):
        assert seen[n, 0] == n + 1
        assert_holds(memories[n], seen[n, 1], steps[: n + 1])


@pytest.mark.parametrize("size", [2, 4, 8])
def test_at_every_step_it_holds_what_its_definition_says(size):
    assert_run_holds(size, *drawn_run(40 * size))


@pytest.mark.thorough
@pytest.mark.parametrize("size", [4, 8, 16])
def test_it_does_with_steps_that_are_not_finite(size):
    assert_run_holds(size, *drawn_run(40 * size, seed=1, bad=0.2))


@pytest.mark.thorough
def test_it_does_with_256_rows_up_to_40_times_as_many_steps():
    values, flags = drawn_run(40 * 256, bad=0.01)
    steps, carry = as_steps(values, flags), ()
    for start in range(0, len(values), 320):
        part = slice(start, start + 320)
        last, (memories, seen) = run_of(256)(values[part], flags[part], *carry)
        carry = (last,)
        for n in range(0, 320, 79):
            until = steps[: start + n + 1]
            assert_holds(np.asarray(memories[n]), seen[n, 1], until)


@hypothesis.given(
    bad=st.lists(st.booleans(), min_size=64, max_size=64), length=st.integers(1, 64)
)
def test_it_does_with_any_pattern_of_them(bad, length):
    values, flags = drawn_run(64)
    flags[:, 2] = bad
    values[:, 0] = np.where(bad, np.nan, values[:, 0])
    _, (memories, seen) = run_of(2)(values, flags)
    steps = as_steps(values, flags)[:length]
    assert_holds(np.asarray(memories[length - 1]), seen[length - 1, 1], steps)


def test_steps_are_drawn_evenly():
    """Of 4096 stretches of 8 steps: each place in a stretch about as often."""
    luck = [reference.luck(step) for step in range(8 * 4096)]
    places = np.argmax(np.reshape(luck, (-1, 8)), axis=1)
    counts = np.bincount(places, minlength=8)
    assert np.all(np.abs(counts - 512) < 4 * 512**0.5)


def test_a_nan_that_stays_moves_nothing():
    values, flags = drawn_run(100)
    run = run_of(8)
    carry, _ = run(values, flags)
    values, flags = np.full_like(values, np.nan), np.ones_like(flags)
    (memory, seen), _ = run(values, flags, carry)
    (later, still), _ = run(values, flags, (memory, seen))
    assert list(seen) == [200, 101] and list(still) == [300, 101]
    before = stretches.in_order(np.asarray(memory), 101)
    after = stretches.in_order(np.asarray(later), 101)
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old.drawn[:, :4], new.drawn[:, :4])
        np.testing.assert_array_equal(old.largest[:, :2], new.largest[:, :2])
    assert list(before[1].drawn[-1, -4:]) == [100] * 4
    assert list(after[1].drawn[-1, -4:]) == [200] * 4


def test_counts_stop_at_the_largest_there_is():
    values, flags = drawn_run(4)
    end = jnp.full(2, stretches.MOST - 1, jnp.int32)
    (memory, seen), _ = run_of(8)(values, flags, (stretches.empty(8, 2, "f4"), end))
    assert list(seen) == [stretches.MOST] * 2
    assert np.all(np.isfinite(memory))


def test_a_step_number_beyond_2_to_24_is_kept_exactly():
    values, flags = drawn_run(3)
    start = stretches.empty(4, 2, "f4"), jnp.array([2**24 + 1, 0], jnp.int32)
    (memory, seen), _ = run_of(4)(values, flags, start)
    _, last = stretches.in_order(np.asarray(memory), int(seen[1]))
    assert list(stretches.steps(last.drawn)) == [2**24 + 1, 2**24 + 2, 2**24 + 3]
