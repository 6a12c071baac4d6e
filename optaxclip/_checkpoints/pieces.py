"""What is an optimizer's state made of, and which of it do only clips and guards keep?

A chain is read as the sequence of its states, whatever is nested or wrapped in it: so a
clip more or less, or a guard around some of them, does not move the others.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import optax

from optaxclip._clips.acclip import AcclipState
from optaxclip._clips.by_value import ClipByValueState
from optaxclip._clips.spam import SpamState
from optaxclip._clips.spectral_norm import SpectralNormState
from optaxclip._clips.stable_spam import AdaClipState
from optaxclip._clips.wrappers import ResetState, UClipState
from optaxclip._engine.state import ClipState
from optaxclip._guards.inputs import ZeroNonfiniteState
from optaxclip._guards.skips import GuardState
from optaxclip._looking import seen as _seen
from optaxclip._looking.record import RecordState

Path = tuple[Any, ...]  # of JAX's keys

# What only looks at updates, or changes them by what it saw. Optax's own is one, too.
CLIPS = (
    *(ClipState, ClipByValueState, AcclipState, SpamState, SpectralNormState),
    *(AdaClipState, ZeroNonfiniteState, optax.ZeroNansState),
)

# What is wrapped around an optimizer or a clip, and where in its state that is.
WRAPPERS = {
    GuardState: "guarded_state",
    RecordState: "recorded_state",
    ResetState: "wrapped_state",
    UClipState: "clip_state",
    optax.ApplyIfFiniteState: "inner_state",
}


class Piece(NamedTuple):
    """One state of a sequence.

    Attributes:
      path: where it is.
      state: itself, of a wrapper without what it wraps, of which a record keeps what
        its columns are of.
      is_needed: whether it holds more than what clips, guards and records keep.
    """

    path: Path
    state: Any
    is_needed: bool


def pieces(state: Any, path: Path = ()) -> Iterator[Piece]:
    """Yields those of a state in their order; what holds nothing is none."""
    if type(state) in WRAPPERS:
        field = WRAPPERS[type(state)]
        wrapped = getattr(state, field)
        columns = _columns(wrapped) if isinstance(state, RecordState) else ()
        yield Piece(path, state._replace(**{field: columns}), False)
        yield from pieces(wrapped, (*path, jax.tree_util.GetAttrKey(field)))
    elif type(state) in (tuple, list):
        for i, one in enumerate(state):
            yield from pieces(one, (*path, jax.tree_util.SequenceKey(i)))
    elif jax.tree.leaves(state, is_leaf=is_hole):
        yield Piece(path, state, _is_needed(state))


def rebuilt(state: Any, others: Iterator[Any]) -> Any:
    """Returns the state with other pieces, given in the order of its own."""
    if type(state) in WRAPPERS:
        field = WRAPPERS[type(state)]
        wrapper = next(others)
        return wrapper._replace(**{field: rebuilt(getattr(state, field), others)})
    if type(state) in (tuple, list):
        return type(state)([rebuilt(one, others) for one in state])
    return next(others) if jax.tree.leaves(state, is_leaf=is_hole) else state


def is_hole(state: Any) -> bool:
    """Returns whether it holds the place of a leaf, so that others keep theirs."""
    return state is None or isinstance(state, optax.MaskedNode)


def children(state: Any) -> dict[Any, Any]:
    """Returns what is right below a node, by its key; of a leaf nothing."""
    found, _ = jax.tree_util.tree_flatten_with_path(
        state, is_leaf=lambda x: x is not state
    )
    return {path[0]: child for path, child in found if path}


def with_children(state: Any, others: list[Any]) -> Any:
    """Returns the node with others right below it, in the order of `children`."""
    return jax.tree.structure(state, is_leaf=lambda x: x is not state).unflatten(others)


def _columns(recorded: Any) -> list[Any]:
    """Returns the kind and the scopes of each clip that has columns in a record."""
    clips = [x for x in _seen.states(recorded) if type(x) in _seen.FIELDS]
    return [{type(x).__name__: {"scope_ids": x.scope_ids}} for x in clips]


def _is_needed(state: Any) -> bool:
    if type(state) in WRAPPERS:
        return _is_needed(getattr(state, WRAPPERS[type(state)]))
    if type(state) in CLIPS:
        return False
    below = children(state)
    is_leaf = is_hole(state) or bool(jax.tree_util.all_leaves([state]))
    return is_leaf or any(map(_is_needed, below.values()))
