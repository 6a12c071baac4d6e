"""Where does a row go, so that a run of any length stays in fixed memory?

The last ``size`` rows are in a ring. A row that leaves the ring joins a stretch of rows
before it. All stretches are ``2**k`` rows long; when there are ``size`` of them, ``k``
grows by one. In the ring, row ``n`` is at ``n % size``. Stretch ``i`` is at ``i`` with
its bits rotated by ``k``: so the first of a pair is where both together belong, and the
second is where the next new stretch will be. They are joined when that begins, and not
before: a step touches two stretches, whatever the size.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._trees import infinity

MOST = int(np.iinfo(np.int32).max)
STEP, WIDTH, SKIPPED, CLIPPED, NONFINITE = range(5)  # of the counts
DRAWN, LARGEST, LAST = range(3)  # parts of the memory
DIGITS = 10  # columns for the counts, two for each: whole numbers below 2**16


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


class Plan(NamedTuple):
    """What becomes of a step, all of them whole numbers.

    Attributes:
      is_held: whether it is no row of its own, but counted in the last one.
      place: of its row in the ring.
      leaves: whether the row that was there joins a stretch.
      slot: of that stretch.
      begins: whether it begins with that row.
      pairs: whether two others become one before.
      first: slot of the first of these; the second is where the new one begins.
      seen: how many steps there were, with this one.
      kept: how many of them are rows.
      counts: of the step.
    """

    is_held: Any
    place: Any
    leaves: Any
    slot: Any
    begins: Any
    pairs: Any
    first: Any
    seen: Any
    kept: Any
    counts: Any


def none(dtype: Any) -> float:
    """Returns the number that stands for a missing one."""
    return -infinity.stand_in(dtype)


def empty(size: int, columns: int, dtype: Any) -> jax.Array:
    """Returns the memory before the first step."""
    return jnp.zeros((3, size, columns + DIGITS), dtype)


def after(
    memory: jax.Array, seen: jax.Array, values: jax.Array, flags: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Returns the memory after a step, and how many steps and rows there were.

    Of steps in a row that are not finite only the first is a row, in which the others
    are counted.

    Args:
      memory: shape ``[3, size, columns + DIGITS]``.
      seen: how many steps and rows there were before, shape ``[2]``, int32.
      values: of the step.
      flags: whether it was skipped, clipped, not finite.
    """
    plan = _planned(memory, *seen, flags)
    rows = _rows(memory, plan, values)
    # All is read before anything is written, which then needs no copy.
    rows, memory = jax.lax.optimization_barrier((rows, memory))
    for part, slot, first, end in (
        (DRAWN, plan.first, 0, 2),
        (DRAWN, plan.slot, 2, 4),
        (LAST, plan.place, 4, 5),
    ):
        start = _start(part, slot)
        memory = jax.lax.dynamic_update_slice(memory, rows[first:end, None], start)
    return memory, jnp.stack([plan.seen, plan.kept])


def _planned(memory: jax.Array, seen: Any, kept: Any, flags: Any) -> Plan:
    size, bits = memory.shape[1], _bits(memory.shape[1])
    newest = _row(_read(memory, LAST, (kept - 1) & (size - 1))[0]).counts
    is_held = (flags[-1] > 0) & (newest[NONFINITE] > 0)
    leaves = ~is_held & (kept >= size)
    number = jnp.maximum(kept - size, 0)  # of the row that leaves the ring
    level = jnp.maximum(32 - jax.lax.clz(number) - bits, 0)
    slot = _slot(number >> level, level, size)
    begins = leaves & (number & ((1 << level) - 1) == 0)
    plan = Plan(
        is_held=is_held,
        place=(kept - is_held) & (size - 1),
        leaves=leaves,
        slot=slot,
        begins=begins,
        pairs=begins & (level > 0),
        first=slot ^ (1 << (level + bits - 1) % bits),
        seen=jnp.where(seen == MOST, seen, seen + 1),
        kept=jnp.where(is_held | (kept == MOST), kept, kept + 1),
        counts=(seen, 1, *flags),
    )
    # One vector, which is one kernel.
    every = jnp.stack([jnp.asarray(x, jnp.int32) for x in jax.tree.leaves(plan)])
    every = jax.lax.optimization_barrier(every)
    return Plan(*every[: len(plan) - 1], counts=every[len(plan) - 1 :])


def _rows(memory: jax.Array, plan: Plan, values: jax.Array) -> jax.Array:
    """Returns what is to be written: two stretches in two parts, and the last row."""
    old = _row(_read(memory, LAST, plan.place)[0])
    new = Row(values, values, plan.counts)
    held = old._replace(counts=_summed(jnp, old.counts, new.counts))
    last = _where(jnp, plan.is_held, held, new)
    first, own = (
        _stretch(_read(memory, DRAWN, slot, 2)) for slot in (plan.first, plan.slot)
    )
    leaving = old._replace(largest=_finite(jnp, old.drawn))
    grown = _where(jnp, plan.leaves, _joined(jnp, own, leaving), own)
    stretches = (
        _where(jnp, plan.pairs, _joined(jnp, first, own), first),
        _where(jnp, plan.begins, leaving, grown),
    )
    parts = [x for row in stretches for x in (row.drawn, row.largest)]
    counts = [x for row in stretches for x in (row.counts, 0 * row.counts)]
    counts = jnp.stack([*counts, last.counts])
    digits = jnp.concatenate([counts >> 16, counts & 0xFFFF], axis=1)
    values = jnp.stack([*parts, last.drawn])
    return jnp.concatenate([values, digits.astype(memory.dtype)], axis=1)


def in_order(memory: np.ndarray, kept: int) -> tuple[Row, Row]:
    """Returns all stretches and the rows of the ring, from the oldest, as NumPy's."""
    size = memory.shape[1]
    newest = kept - size - 1  # of those that have left the ring
    last = _row(memory[LAST, np.arange(max(newest + 1, 0), kept) & (size - 1)])
    last = last._replace(largest=_finite(np, last.drawn))
    level = max(max(newest, 0).bit_length() - _bits(size), 0)
    number = np.arange((newest >> level) + 1)
    own, others = (
        _stretch(memory[:LAST, _slot(x, level, size)])
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


def _start(part: int, slot: jax.Array) -> tuple[jax.Array, ...]:
    """Returns where a row begins; what has no sign is not asked for it."""
    return jnp.uint32(part), slot.astype(jnp.uint32), jnp.uint32(0)


def _read(memory: jax.Array, part: int, slot: jax.Array, parts: int = 1) -> jax.Array:
    sizes = (parts, 1, memory.shape[2])
    return jax.lax.dynamic_slice(memory, _start(part, slot), sizes)[:, 0]


def _row(drawn: Any) -> Row:
    """Returns a row of which nothing but its values and counts are known."""
    values, digits = drawn[..., :-DIGITS], drawn[..., -DIGITS:].astype(np.int32)
    return Row(values, values, (digits[..., :5] << 16) | digits[..., 5:])


def _stretch(parts: Any) -> Row:
    return _row(parts[0])._replace(largest=parts[1][..., :-DIGITS])


def _finite(xp: Any, values: Any) -> Any:
    return xp.where(xp.isfinite(values), values, none(values.dtype))


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
    x = counts[..., STEP : STEP + 1].astype(np.uint32)
    x = x ^ np.uint32(0x9E3779B9)  # without, 0 would stay 0
    x = (x ^ (x >> 16)) * xp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * xp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _where(xp: Any, condition: Any, new: Row, old: Row) -> Row:
    """Returns one of two stretches, each of which has a last axis of its own."""
    condition = condition[..., None] > 0
    return Row(*(xp.where(condition, *pair) for pair in zip(new, old, strict=True)))
