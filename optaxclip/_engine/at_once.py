"""Hundreds of small calls, or one compiled one? What a clip does outside of ``jit``.

There every operation is a call of its own, which takes longer than what it computes. So
the whole update is compiled, with a clip in it that is made again of traced numbers:
another threshold compiles nothing.
"""

import contextlib
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from optaxclip._arguments import checks
from optaxclip._measure import scopes as _scopes

_P = ParamSpec("_P")
_Clip = optax.GradientTransformationExtraArgs
_Maker = Callable[_P, _Clip]


class _Recipe(NamedTuple):
    """How a clip is made: of equal ones there is one compiled update.

    Attributes:
      make: the function that makes it.
      treedef: structure of its arguments.
      fixed: these, None in the places of numbers.
    """

    make: Callable[..., _Clip]
    treedef: Any
    fixed: tuple[Any, ...]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Result:
    """The structure of a result, and which of its leaves are leaves that were given.

    By their places among those; -1 for one that was computed.
    """

    treedef: Any
    places: tuple[int, ...]


def at_once(*names: str) -> Callable[[_Maker[_P]], _Maker[_P]]:
    """Makes the update of a clip one compiled call where no ``jit`` is around it.

    Only of JAX's arrays, and by a clip that is of this library alone: what a user wrote
    may read a variable that has changed since. What fails runs again without, so errors
    are the same, and nothing in them is of ``jit``. What passes through is not copied.

    Args:
      names: the arguments of the function that are thresholds; others are static.
    """

    def decorated(make: _Maker[_P]) -> _Maker[_P]:
        signature = inspect.signature(make)

        @functools.wraps(make)
        def maker(*args: _P.args, **kwargs: _P.kwargs) -> _Clip:
            clip = make(*args, **kwargs)
            arguments = signature.bind(*args, **kwargs).arguments
            with contextlib.suppress(ValueError):  # patterns that have no order
                return _compiled(clip, make, arguments, names)
            return clip

        return maker

    return decorated


def _compiled(
    clip: _Clip,
    make: Callable[..., _Clip],
    arguments: dict[str, Any],
    names: Sequence[str],
) -> _Clip:
    numbers, fixed = [], []
    treedef = jax.tree.structure(arguments, is_leaf=callable)
    for name in sorted(arguments):
        for leaf in jax.tree.leaves(arguments[name], is_leaf=callable):
            if name in names and isinstance(leaf, checks.STATIC):
                leaf = float(leaf)
            is_number = name in names and (_is_array(leaf) or _is_in_range(leaf))
            numbers += [leaf] if is_number else []
            fixed.append(None if is_number else leaf)
    if not all(map(_is_known, fixed)):
        return clip
    recipe = _Recipe(make, treedef, tuple(fixed))

    @functools.wraps(clip.update)
    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        given = updates, state, params
        leaves = jax.tree.leaves(given)
        if all(map(_is_array, leaves)):
            with contextlib.suppress(Exception):
                computed, result = _run(recipe, numbers, given)
                new = iter(computed)
                every = [next(new) if i < 0 else leaves[i] for i in result.places]
                return result.treedef.unflatten(every)
        return clip.update(updates, state, params, **extra_args)

    return clip._replace(update=update_fn)


@functools.partial(jax.jit, static_argnums=0)
def _run(recipe: _Recipe, numbers: list[Any], given: Any) -> tuple[list[Any], _Result]:
    rest = iter(numbers)
    leaves = [next(rest) if x is None else x for x in recipe.fixed]
    clip = recipe.make(**recipe.treedef.unflatten(leaves))
    places = {id(x): i for i, x in enumerate(jax.tree.leaves(given))}
    leaves, treedef = jax.tree.flatten(clip.update(*given))
    found = [places.get(id(x), -1) for x in leaves]
    computed = [x for x, i in zip(leaves, found, strict=True) if i < 0]
    return computed, _Result(treedef, tuple(found))


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array) and not isinstance(x, Tracer)


def _is_in_range(x: Any) -> bool:
    return isinstance(x, float) and abs(x) <= float(jnp.finfo(jnp.float32).max)


def _is_known(x: Any) -> bool:
    """Returns whether it is one of few, and the same at every call.

    An infinity is, which a clip has to see as such. A function made in another, as
    schedules and rules are, is neither.
    """
    if inspect.isfunction(x):
        return _scopes.is_ours(x) and x.__name__ == x.__qualname__
    is_infinite = isinstance(x, float) and math.isinf(x)
    return x is None or isinstance(x, int | str) or is_infinite
