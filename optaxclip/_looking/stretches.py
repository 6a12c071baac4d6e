"""Where does a row go, so that a run of any length stays in fixed memory?

The last ``size`` rows are in a ring. A row that leaves the ring joins a stretch of rows
before it. All stretches are ``2**k`` rows long; when there are ``size`` of them, ``k``
grows by one. In the ring, row ``n`` is at ``n % size``. Stretch ``i`` is at ``i`` with
its bits rotated by ``k``: so the first of a pair is where both together belong, and the
second is where the next new stretch will be. They are joined when that begins, and not
before: a step touches two stretches, whatever the size.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._trees import infinity

MOST = int(np.iinfo(np.int32).max)
STEP, WIDTH, SKIPPED, CLIPPED, NONFINITE = range(5)  # of the counts
DRAWN, LARGEST, LAST = range(3)  # of the memory
DIGITS = 10  # columns for the counts, two for each: whole numbers below 2**16

Memory = Any  # [3, size, columns + DIGITS]


class Row(NamedTuple):
    """A row, or a stretch of them.

    Attributes:
      drawn: the values of one of its steps, drawn evenly.
      largest: of each value the largest finite one, `none` if there is no such.
      counts: that step, and how many steps there were, how many of them were skipped,
        how many clipped, how many not finite; int32.
    """

    drawn: Any
    largest: Any
    counts: Any


def none(dtype: Any) -> float:
    """Returns the number that stands for a missing one."""
    return -infinity.stand_in(dtype)


def empty(size: int, columns: int, dtype: Any) -> jax.Array:
    """Returns the memory before the first step."""
    return jnp.zeros((3, size, columns + DIGITS), dtype)


def after(
    memory: jax.Array, kept: jax.Array, values: jax.Array, counts: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the memory after a step, and how many rows it has seen.

    Of steps in a row that are not finite only the first is a row, in which the others
    are counted.

    Args:
      memory: that before the step.
      kept: rows it has seen, int32.
      values: of the step.
      counts: of the step.
    """
    size = memory.shape[1]
    newest = _numbers(_part(memory, LAST, kept - 1)[-DIGITS:])[NONFINITE]
    is_held = (counts[NONFINITE] > 0) & (newest > 0)
    place = (kept - is_held) & (size - 1)
    old = _part(memory, LAST, place)
    old_values, old_counts = old[:-DIGITS], _numbers(old[-DIGITS:])
    both = _summed(jnp, old_counts, counts)
    last = _joint(
        jnp.where(is_held, old_values, values), jnp.where(is_held, both, counts)
    )
    leaves = ~is_held & (kept >= size)
    row = _fresh(jnp, old_values, old_counts)
    stretches = _joined_by(row, memory, jnp.maximum(kept - size, 0), leaves)
    # All that is read is read before anything is written, which then needs no copy.
    rows = [*stretches, (LAST, place, last[None])]
    rows, memory = jax.lax.optimization_barrier((rows, memory))
    for first, slot, new in rows:
        start = jnp.uint32(first), slot.astype(jnp.uint32), jnp.uint32(0)
        memory = jax.lax.dynamic_update_slice(memory, new[:, None], start)
    return memory, jnp.where(is_held | (kept == MOST), kept, kept + 1)


def _joined_by(
    row: Row, memory: jax.Array, number: jax.Array, leaves: jax.Array
) -> list[tuple[int, jax.Array, jax.Array]]:
    """Returns two stretches with their slots, after a row has joined, if it does.

    Args:
      row: the one that leaves the ring.
      memory: that before the step.
      number: of the row, from 0.
      leaves: whether it does.
    """
    size = memory.shape[1]
    level = jnp.maximum(32 - jax.lax.clz(number) - _bits(size), 0)
    slot = _slot(number >> level, level, size)
    first = slot ^ (1 << (level + _bits(size) - 1) % _bits(size))
    begins = leaves & (number & ((1 << level) - 1) == 0)
    own, partner = (_at(memory, x) for x in (slot, first))
    pair = _joined(jnp, partner, own)
    grown = _where(jnp, leaves, _joined(jnp, own, row), own)
    news = [
        (first, _where(jnp, begins & (level > 0), pair, partner)),
        (slot, _where(jnp, begins, row, grown)),
    ]
    return [(DRAWN, place, _both(new)) for place, new in news]


def in_order(memory: np.ndarray, kept: int) -> tuple[Row, Row]:
    """Returns all stretches and the rows of the ring, from the oldest, as NumPy's."""
    size = memory.shape[1]
    newest = kept - size - 1  # of those that have left the ring
    ring = memory[LAST, np.arange(max(newest + 1, 0), kept) & (size - 1)]
    last = _fresh(np, ring[:, :-DIGITS], _numbers(ring[:, -DIGITS:]))
    level = max(max(newest, 0).bit_length() - _bits(size), 0)
    number = np.arange((newest >> level) + 1)
    own, others = (
        _of_parts(memory[:LAST, _slot(x, level, size)])
        for x in (number, number ^ (size // 2))
    )
    apart = (number < size // 2) & (number + size // 2 > newest >> level) & (level > 0)
    return _where(np, apart, _joined(np, own, others), own), last


def _bits(size: int) -> int:
    return size.bit_length() - 1


def _slot(number: Any, level: Any, size: int) -> Any:
    """Returns the number of a stretch with its bits rotated by the level."""
    shift = level % _bits(size)
    rotated = (number << shift) | (number >> (_bits(size) - shift))
    return rotated & (size - 1)


def _part(memory: jax.Array, first: int, slot: jax.Array, count: int = 1) -> jax.Array:
    """Returns one row of one part of the memory, or of several."""
    size, columns = memory.shape[1:]
    slot = (slot & (size - 1)).astype(jnp.uint32)
    start = jnp.uint32(first), slot, jnp.uint32(0)
    found = jax.lax.dynamic_slice(memory, start, (count, 1, columns))
    return jnp.squeeze(found, (0, 1) if count == 1 else 1)


def _at(memory: jax.Array, slot: jax.Array) -> Row:
    return _of_parts(_part(memory, DRAWN, slot, 2))


def _of_parts(parts: Any) -> Row:
    """Returns a stretch from what the memory has of it."""
    drawn, largest = parts
    counts = _numbers(drawn[..., -DIGITS:])
    return Row(drawn[..., :-DIGITS], largest[..., :-DIGITS], counts)


def _both(row: Row) -> jax.Array:
    """Returns what the memory has of a stretch."""
    rest = jnp.zeros(DIGITS, row.largest.dtype)
    return jnp.stack([_joint(row.drawn, row.counts), jnp.append(row.largest, rest)])


def _joint(values: jax.Array, counts: jax.Array) -> jax.Array:
    digits = jnp.concatenate([counts >> 16, counts & 0xFFFF])
    return jnp.concatenate([values, digits.astype(values.dtype)])


def _numbers(digits: Any) -> Any:
    """Returns counts from their digits."""
    high, low = (digits[..., i : i + 5].astype(np.int32) for i in (0, 5))
    return (high << 16) | low


def _fresh(xp: Any, values: Any, counts: Any) -> Row:
    """Returns a stretch of one row."""
    return Row(values, xp.where(xp.isfinite(values), values, none(values.dtype)), counts)


def _joined(xp: Any, first: Row, second: Row) -> Row:
    """Returns two stretches as one: of their draws that whose step has more luck."""
    takes = _luck(xp, second.counts) > _luck(xp, first.counts)
    step = xp.where(takes, second.counts, first.counts)
    sums = _summed(xp, first.counts, second.counts)
    return Row(
        xp.where(takes, second.drawn, first.drawn),
        xp.maximum(first.largest, second.largest),
        xp.where(np.arange(5) == STEP, step, sums),
    )


def _summed(xp: Any, first: Any, second: Any) -> Any:
    """Returns the sums of counts, the largest there is where one is too large."""
    sums = first + xp.minimum(second, MOST - first)
    return xp.where(np.arange(5) == STEP, first, sums)


def _luck(xp: Any, counts: Any) -> Any:
    """Returns a number for each step that looks random; no two have the same.

    It is MurmurHash3's last part, so that a run that goes on draws the same.
    """
    x = counts[..., STEP : STEP + 1].astype(xp.uint32)
    x = x ^ xp.uint32(0x9E3779B9)  # without, 0 would stay 0
    x = (x ^ (x >> 16)) * xp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * xp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _where(xp: Any, condition: Any, new: Row, old: Row) -> Row:
    """Returns one of two stretches, each of which has a last axis of its own."""
    condition = condition[..., None]
    return Row(*(xp.where(condition, *pair) for pair in zip(new, old, strict=True)))
