"""What did the clips and guards inside of an optimizer see at this step?

A step that a clip did not see leaves its state as it was: one that a guard skipped, or
of ``optax.MultiSteps`` one that only accumulates.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._clips.by_value import ClipByValueState
from optaxclip._engine.state import ClipState
from optaxclip._guards.skips import GuardState
from optaxclip._looking import summary as _summary
from optaxclip._measure import names as _names

# Of each kind of clip the fields that are columns, and what they are called.
FIELDS = {
    ClipState: {"norms": "norm", "max_norms": "max_norm", "factors": "factor"},
    ClipByValueState: {"largest": "largest", "clipped_fractions": "clipped_fraction"},
}


class Seen(NamedTuple):
    """What all clips saw, one vector, and what became of the step.

    Attributes:
      values: of all clips, `none` where one has not seen this step.
      is_clipped: whether any clip had something to do.
      is_skipped: whether any guard has skipped it.
    """

    values: jax.Array
    is_clipped: jax.Array
    is_skipped: jax.Array


def seen(before: Any, state: Any, dtype: Any, none: float) -> Seen:
    """Compares the states before and after a step."""
    pairs = list(zip(states(before), states(state), strict=True))
    parts, clipped = [jnp.zeros(0, dtype)], jnp.zeros((), bool)
    skipped = jnp.zeros((), bool)
    for old, new in pairs:
        if isinstance(new, GuardState):
            skipped |= new.skipped_count != old.skipped_count
            continue
        moved = new.update_count != old.update_count
        for field in FIELDS[type(new)]:
            values = jnp.ravel(getattr(new, field)).astype(dtype)
            parts.append(jnp.where(moved, values, none))
        clipped |= moved & jnp.any(_is_clipped(new))
    return Seen(jnp.concatenate(parts), clipped, skipped)


def count(state: Any) -> int:
    """Returns how many columns there are."""
    fields = [
        getattr(clip, field)
        for clip in states(state)
        for field in FIELDS.get(type(clip), ())
    ]
    return sum(np.size(field) for field in fields)


def states(state: Any) -> Iterator[Any]:
    """Yields those of all clips and guards that have something to tell."""
    for _, _, one in _summary.found_in(state):
        if isinstance(one, (GuardState, *FIELDS)):
            yield one


def names(state: Any, paths: Sequence[str]) -> list[str]:
    """Returns the names of the columns, those that `summary` has."""
    found = []
    known = _names.candidates(paths) if paths else {}
    for title, _, clip in _summary.titled(list(_summary.found_in(state))):
        for field, name in FIELDS.get(type(clip), {}).items():
            (values,) = jax.tree.leaves(getattr(clip, field))  # `nnx` has variables
            (ids,) = jax.tree.leaves(clip.scope_ids)
            scopes = [""] if not np.ndim(values) else of_scopes(ids, known)
            found += [f"{title}/{name}/{scope}".rstrip("/") for scope in scopes]
    return found


def of_scopes(ids: Any, known: dict[tuple[int, int], str]) -> list[str]:
    """Returns the names of scopes."""
    return _names.decoded(np.asarray(ids).astype(int).reshape(-1, 4).tolist(), known)


def _is_clipped(clip: Any) -> jax.Array:
    if isinstance(clip, ClipState):
        return clip.factors < 1
    return clip.clipped_fractions > 0
