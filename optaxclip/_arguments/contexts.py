"""Functions that run while JAX knows something the user has said of the updates."""

import functools
from collections.abc import Callable
from typing import Any

import optax

from optaxclip._arguments import mistakes


def told(
    fun: Any, context: Any, value: Any, check: Callable[[Any], None], name: str
) -> Any:
    """Returns a transformation, or a function of updates, that runs in a context.

    Args:
      fun: transformation or function.
      context: JAX's, which is part of the key of all of its caches.
      value: of the context.
      check: raises where the tree that is handed in does not fit it.
      name: of the public function, as in a call of it, for messages.
    """

    def within(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            check(args[0] if args else next(iter(kwargs.values())))
            with context(value):
                result = function(*args, **kwargs)
            if isinstance(result, optax.GradientTransformation):
                raise TypeError(_unfit(function, name))  # made now, it would run later
            return result

        return run

    if isinstance(fun, optax.GradientTransformation):
        inner = optax.with_extra_args_support(fun)
        return optax.GradientTransformationExtraArgs(
            within(inner.init), within(inner.update)
        )
    if not callable(fun) or mistakes.makes(fun):
        raise TypeError(_unfit(fun, name))
    return within(fun)


def _unfit(fun: Any, name: str) -> str:
    return (
        "Expected a transformation or a function of updates, such as"
        f" `{name}`, got"
        f" {fun!r} of type {type(fun).__name__}."
    )
