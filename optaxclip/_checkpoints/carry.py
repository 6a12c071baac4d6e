"""The state of one optimizer for another that differs in clips, guards, records."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.tree_util import keystr

from optaxclip._checkpoints import pieces as _pieces
from optaxclip._checkpoints.pieces import Path, Piece

REMEDY = (
    " `carry_over` is for optimizers that differ in clips, guards and records alone."
    " Restore the old state with `old_optimizer.init(params)` as the template, and pass"
    " `new_optimizer.init(params)` of the same params."
)


def carry_over(old_state: Any, new_state: Any) -> Any:
    """Returns an optimizer's first state, with all that an older run had learnt in it.

    For a run that goes on with other clips, guards or records than it began with: from
    Optax's clips to these and back, with a clip or a guard more or less, under
    :func:`record` from now on. Moments, counts, schedules, hyperparameters,
    accumulators are taken from the old state, in the places that they have in the new.

    .. code-block:: python

      old_state = restore(template=old_optimizer.init(params))
      opt_state = optaxclip.carry_over(old_state, optimizer.init(params))

    Chains, nested or not, are read as one sequence, dictionaries and
    ``optax.partition`` by their keys, everything else by its fields. The states of
    clips, guards and records do not count in it. Where the old state has the same one
    at this place, of the same scopes, it is taken as well; else it begins anew, and
    what the new optimizer has no place for is dropped. They are those of this library
    and ``optax.apply_if_finite`` and ``optax.zero_nans``; the memory of
    :func:`reset_momentum` and :func:`u_clip` is one, what they wrap is none. A record
    begins anew where its columns differ, as they do by a clip more inside of it. Two
    guards of one shape, one of a norm and one of the loss, are not told apart.

    Guarantees:
      * The result has the structure, shapes and dtypes of ``new_state``.
      * Everything else in the old state is in the result, and everything else in the
        result is from the old state: or it raises.
      * Nothing is copied or moved: arrays keep their bits and shardings.

    Args:
      old_state: state of the optimizer until now, or anything that holds one, such as
        a Flax ``TrainState``; of arrays, ``jax.ShapeDtypeStruct`` or traced.
      new_state: what the new optimizer's ``init`` returned for the same params, or the
        same thing with that in it.

    Returns:
      The state for the new optimizer.

    Raises:
      ValueError: something in the old state has no place in the new one, or the other
        way round; a shape or dtype differs. With the path.

    Examples:
      >>> params = {"w": jnp.zeros(2)}
      >>> old = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
      >>> _, old_state = old.update({"w": jnp.ones(2)}, old.init(params), params)
      >>> clip = optaxclip.clip_by_global_norm(1.0)
      >>> new = optaxclip.record(optax.chain(clip, optax.adam(1e-3)))
      >>> opt_state = optaxclip.carry_over(old_state, new.init(params))
      >>> print(optax.tree.get(opt_state, "nu")["w"])
      [0.0005 0.0005]
    """
    return _carried(old_state, new_state, (), ())


def _carried(old: Any, new: Any, old_path: Path, new_path: Path) -> Any:
    """Returns the new state with the pieces of the old one, in their order."""
    olds = list(_pieces.pieces(old, old_path))
    news = list(_pieces.pieces(new, new_path))
    needed = [piece for piece in olds if piece.is_needed]
    _check_same_number(needed, [piece for piece in news if piece.is_needed])
    spare = _between(olds)
    place, found = 0, []
    for piece in news:
        if piece.is_needed:
            found.append(_filled(needed[place], piece))
            place += 1
        else:
            found.append(_same_or_fresh(spare[place], piece))
    return _pieces.rebuilt(new, iter(found))


def _between(olds: list[Piece]) -> list[list[Any]]:
    """Returns the states of clips, guards and records before each of the others."""
    spare: list[list[Any]] = [[]]
    for piece in olds:
        if piece.is_needed:
            spare.append([])
        else:
            spare[-1].append(piece.state)
    return spare


def _same_or_fresh(spare: list[Any], piece: Piece) -> Any:
    """Returns the first that fits, which is used up, or else the new one."""
    for i, old in enumerate(spare):
        if _fits(old, piece.state):
            return spare.pop(i)
    return piece.state


def _fits(old: Any, new: Any) -> bool:
    """Returns whether a state of a clip is one of this clip, for the same scopes."""
    if jax.tree.structure(old) != jax.tree.structure(new):
        return False
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(old), jax.tree.leaves(new), strict=True
    )
    return all(
        not _differ(x, y) and not ("scope_ids" in keystr(path) and _are_others(x, y))
        for (path, x), y in pairs
    )


def _are_others(ids: Any, new_ids: Any) -> bool:
    """Returns whether it is known that these are different scopes."""
    unknown = Tracer, jax.ShapeDtypeStruct
    if isinstance(ids, unknown) or isinstance(new_ids, unknown):
        return False
    return not np.array_equal(ids, new_ids)


def _filled(old: Piece, new: Piece) -> Any:
    """Returns the new one of two states that should be of one kind, with the old."""
    olds, news = _pieces.children(old.state), _pieces.children(new.state)
    if not _are_alike(old.state, new.state):
        raise ValueError(
            f"Expected in the old state {_named(new)}, got {_named(old)}.{REMEDY}"
        )
    if not news:
        if difference := _differ(old.state, new.state):
            raise ValueError(
                f"Expected {_shown(new.path)} to be {difference[1]} in the old state,"
                f" got {difference[0]} at {_shown(old.path)}.{REMEDY}"
            )
        return old.state
    for key in olds.keys() - news.keys():
        _carried(olds[key], (), (*old.path, key), new.path)
    filled = [
        _carried(olds.get(key, ()), one, (*old.path, key), (*new.path, key))
        for key, one in news.items()
    ]
    return _pieces.with_children(new.state, filled)


def _are_alike(old: Any, new: Any) -> bool:
    """Returns whether both are arrays, holes or nodes of one kind."""
    both = old, new
    if any(map(_pieces.is_hole, both)) or any(map(_pieces.children, both)):
        same = type(old) is type(new)
        return same or all(isinstance(x, Mapping) for x in both)
    return True


def _differ(old: Any, new: Any) -> tuple[str, str] | None:
    """Returns both shapes, or both dtypes, of arrays that differ in them."""
    if np.shape(old) != np.shape(new):
        return f"of shape {np.shape(old)}", f"of shape {np.shape(new)}"
    dtypes = [getattr(x, "dtype", None) for x in (old, new)]
    if None not in dtypes and dtypes[0] != dtypes[1]:  # a Python number has none
        return f"{dtypes[0]}", f"{dtypes[1]}"
    return None


def _check_same_number(olds: list[Piece], news: list[Piece]) -> None:
    if len(olds) == len(news):
        return
    pairs = zip(olds, news, strict=False)
    alike = [_are_alike(x.state, y.state) for x, y in pairs]
    first = [*alike, False].index(False)
    kinds = [[type(piece.state).__name__ for piece in one] for one in (olds, news)]
    both = f" Of these the old one has {kinds[0]}, the new one {kinds[1]}."
    if len(olds) > len(news):
        raise ValueError(
            f"Expected a place in the new state for {_named(olds[first])} of the old"
            f" one, got none.{both}{REMEDY}"
        )
    raise ValueError(
        f"Expected something in the old state for {_named(news[first])} of the new one,"
        f" got nothing.{both}{REMEDY}"
    )


def _named(piece: Piece) -> str:
    return f"the {type(piece.state).__name__} at {_shown(piece.path)}"


def _shown(path: Path) -> str:
    return repr(keystr(path, simple=True, separator="/"))
