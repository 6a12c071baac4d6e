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
DRAWN, LARGEST, LAST = range(3)  # parts of the memory
HIGH, LOW = -6, -5  # columns: the number of a step, its upper half and its lower
COUNTS = ("width", "skipped", "clipped", "nonfinite")  # the last columns
OWN = 2 + len(COUNTS)  # columns that are not the user's
YES_OR_NO = ("is_held", "leaves", "begins", "pairs")  # of a `Plan`


class Row(NamedTuple):
    """A row, or a stretch of them: its columns are the last axis.

    Attributes:
      drawn: the values of one of its steps, drawn evenly, the number of that step, and
        how many steps there were, were skipped, clipped, not finite.
      largest: of each value the largest finite one, `none` if there is no such.
    """

    drawn: Any
    largest: Any


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


def none(dtype: Any) -> float:
    """Returns the number that stands for a missing one."""
    return -infinity.stand_in(dtype)


def empty(size: int, columns: int, dtype: Any) -> jax.Array:
    """Returns the memory before the first step."""
    return jnp.zeros((3, size, columns + OWN), dtype)


def after(
    memory: jax.Array, seen: jax.Array, values: jax.Array, flags: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Returns the memory after a step, and how many steps and rows there were.

    Of steps in a row that are not finite only the first is a row, in which the others
    are counted.

    Args:
      memory: shape ``[3, size, columns + OWN]``.
      seen: how many steps and rows there were before, shape ``[2]``, int32.
      values: of the step.
      flags: whether it was skipped, clipped, not finite.
    """
    plan = _planned(memory, seen[0], seen[1], flags[-1])
    numbers = seen[0] >> 16, seen[0] & 0xFFFF, jnp.ones(()), *flags
    numbers = jnp.stack([jnp.asarray(x, values.dtype) for x in numbers])
    new = jnp.concatenate([values, numbers])
    rows = _rows(memory, plan, new)
    # All is read before anything is written, which then needs no copy.
    rows, memory = jax.lax.optimization_barrier((rows, _on_mesh_of(memory, values)))
    for part, slot, first, end in (
        (DRAWN, plan.first, 0, 2),
        (DRAWN, plan.slot, 2, 4),
        (LAST, plan.place, 4, 5),
    ):
        start = _start(part, slot)
        memory = jax.lax.dynamic_update_slice(memory, rows[first:end, None], start)
    return memory, jnp.stack([plan.seen, plan.kept])


def _on_mesh_of(memory: jax.Array, values: jax.Array) -> jax.Array:
    """Returns the memory as JAX 0.8 wants it, where zeros have no mesh."""
    own, other = (getattr(jax.typeof(x), "sharding", None) for x in (memory, values))
    if own is None or other is None or own.mesh == other.mesh:
        return memory
    is_same = jnp.isnan(values[0]) | True  # on the mesh, and no work once compiled
    return jnp.where(is_same, memory, memory)


def _planned(memory: jax.Array, seen: Any, kept: Any, is_nonfinite: Any) -> Plan:
    size, bits = memory.shape[1], _bits(memory.shape[1])
    (newest,) = _read(memory, LAST, (kept - 1) & (size - 1))
    is_held = jnp.asarray(is_nonfinite) & (newest[-1] > 0)
    leaves = ~is_held & (kept >= size)
    number = jnp.maximum(kept - size, 0)  # of the row that leaves the ring
    level = jnp.maximum(32 - jax.lax.clz(number) - bits, 0)
    slot = _slot(number >> level, level, size)
    begins = leaves & (number & ((1 << level) - 1) == 0)
    plan = Plan(
        is_held=is_held,
        place=(kept - is_held.astype(jnp.int32)) & (size - 1),
        leaves=leaves,
        slot=slot,
        begins=begins,
        pairs=begins & (level > 0),
        first=slot ^ (1 << (level + bits - 1) % bits),
        seen=jnp.where(seen == MOST, seen, seen + 1),
        kept=jnp.where(is_held | (kept == MOST), kept, kept + 1),
    )
    # One vector, and by selections: so it is one kernel, on a CPU too.
    every = jnp.zeros((), jnp.int32)
    for i, number in enumerate(plan):
        number = jnp.asarray(number, jnp.int32)
        every = jnp.where(jnp.arange(len(plan)) == i, number, every)
    plan = Plan(*jax.lax.optimization_barrier(every))
    return plan._replace(**{x: getattr(plan, x) > 0 for x in YES_OR_NO})


def _rows(memory: jax.Array, plan: Plan, new: jax.Array) -> jax.Array:
    """Returns what is to be written: two stretches in two parts, and the last row."""
    (old,) = _read(memory, LAST, plan.place)
    last = jnp.where(plan.is_held, _summed(jnp, old, new, old), new)
    first, own = (
        Row(*_read(memory, DRAWN, slot, 2)) for slot in (plan.first, plan.slot)
    )
    leaving = _fresh(jnp, old)
    grown = _where(jnp, plan.leaves, _joined(jnp, own, leaving), own)
    first = _where(jnp, plan.pairs, _joined(jnp, first, own), first)
    return jnp.stack([*first, *_where(jnp, plan.begins, leaving, grown), last])


def in_order(memory: np.ndarray, kept: int) -> tuple[Row, Row]:
    """Returns all stretches and the rows of the ring, from the oldest, as NumPy's."""
    size = memory.shape[1]
    newest = kept - size - 1  # of those that have left the ring
    last = memory[LAST, np.arange(max(newest + 1, 0), kept) & (size - 1)]
    level = max(max(newest, 0).bit_length() - _bits(size), 0)
    number = np.arange((newest >> level) + 1)
    own, others = (
        Row(*memory[:LAST, _slot(x, level, size)]) for x in (number, number ^ size // 2)
    )
    apart = (number < size // 2) & (number + size // 2 > newest >> level) & (level > 0)
    whole = _where(np, apart[:, None], _joined(np, own, others), own)
    return whole, _fresh(np, last)


def steps(drawn: np.ndarray) -> np.ndarray:
    """Returns the number of the step that each row shows."""
    high, low = (drawn[..., i].astype(np.int64) for i in (HIGH, LOW))
    return (high << 16) | low


def _bits(size: int) -> int:
    return size.bit_length() - 1


def _slot(number: Any, level: Any, size: int) -> Any:
    """Returns the number of a stretch with its bits rotated by the level."""
    shift = level % _bits(size)
    rotated = (number << shift) | (number >> (_bits(size) - shift))
    return rotated & (size - 1)


def _start(part: int, slot: jax.Array) -> tuple[jax.Array, ...]:
    """Returns where a row begins; without a sign, for nothing is behind the end."""
    return jnp.uint32(part), slot.astype(jnp.uint32), jnp.uint32(0)


def _read(memory: jax.Array, part: int, slot: jax.Array, parts: int = 1) -> jax.Array:
    sizes = (parts, 1, memory.shape[2])
    return jax.lax.dynamic_slice(memory, _start(part, slot), sizes)[:, 0]


def _fresh(xp: Any, drawn: Any) -> Row:
    """Returns a stretch of one row."""
    return Row(drawn, xp.where(xp.isfinite(drawn), drawn, none(drawn.dtype)))


def _joined(xp: Any, first: Row, second: Row) -> Row:
    """Returns two stretches as one: of their draws that whose step has more luck."""
    takes = _luck(xp, second.drawn) > _luck(xp, first.drawn)
    drawn = xp.where(takes, second.drawn, first.drawn)
    drawn = _summed(xp, first.drawn, second.drawn, drawn)
    return Row(drawn, xp.maximum(first.largest, second.largest))


def _summed(xp: Any, first: Any, second: Any, rest: Any) -> Any:
    """Returns the sums of what is counted, and the rest of the columns."""
    is_count = np.arange(rest.shape[-1]) >= rest.shape[-1] - len(COUNTS)
    return xp.where(is_count, first + xp.where(is_count, second, 0), rest)


def _luck(xp: Any, drawn: Any) -> Any:
    """Returns a number for the step of each row, different ones that look random.

    It is MurmurHash3's last part, so that a run that goes on draws the same.
    """
    high, low = (drawn[..., i, None].astype(np.uint32) for i in (HIGH, LOW))
    x = ((high << 16) | low) ^ np.uint32(0x9E3779B9)  # without, 0 would stay 0
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _where(xp: Any, condition: Any, new: Row, old: Row) -> Row:
    return Row(*(xp.where(condition, *pair) for pair in zip(new, old, strict=True)))
