"""Errors about arguments, in one phrasing: what was expected, what came, what to do."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optax

from optaxclip._arguments import mistakes

THRESHOLD = "a number, a schedule, a rule, or a mapping from path patterns to those"
STATIC = (int, float, np.generic, np.ndarray)  # numbers known without running anything


OFF = " To switch a clip off, use `jnp.inf`."


def number(
    value: Any,
    what: str,
    minimum: float = 0.0,
    kinds: str = "a number",
    remedy: str = OFF,
) -> None:
    """Raises unless ``value`` is a real scalar, possibly traced.

    Args:
      value: what came.
      what: the argument's name, for the message.
      minimum: smallest number allowed.
      kinds: what the argument may be, for the message.
      remedy: what to do instead, for the message.

    Raises:
      TypeError: not a number, or one that is not real.
      ValueError: not a scalar; NaN or below ``minimum``, where that is known without
        running anything: of a Python or NumPy number.
    """
    is_array = hasattr(value, "dtype") and hasattr(value, "shape")
    if isinstance(value, bool) or not (is_array or isinstance(value, int | float)):
        raise TypeError(_unfit(value, what, kinds, remedy))
    if is_array and getattr(getattr(value, "dtype", None), "kind", "O") in "bcOSU":
        raise TypeError(_unfit(value, what, kinds, remedy))
    if np.shape(value) != ():
        raise ValueError(
            f"Expected {what} to be {kinds}, got an array of shape {np.shape(value)}."
        )
    if isinstance(value, STATIC):
        if math.isnan(float(value)) or float(value) < minimum:
            raise ValueError(f"Expected {what} >= {minimum:g}, got {value}.{remedy}")


def decay(value: Any, what: str) -> None:
    """Raises unless ``value`` is the weight of the past in an average."""
    if isinstance(value, (int, float, np.generic)) and not 0 <= float(value) < 1:
        raise ValueError(f"Expected 0 <= {what} < 1, got {value}.")
    number(value, what, remedy="")


def steps(value: Any, what: str, minimum: int, remedy: str = "") -> None:
    """Raises unless ``value`` is a number of steps, possibly traced."""
    kinds = f"a whole number >= {minimum}"
    number(value, what, -math.inf, kinds, remedy="")
    is_whole = np.dtype(getattr(value, "dtype", type(value))).kind in "iu"
    if not is_whole or (isinstance(value, STATIC) and float(value) < minimum):
        raise ValueError(f"Expected {what} to be {kinds}, got {value}.{remedy}")


def window(value: Any) -> None:
    """Raises unless ``value`` is a number of norms that a rule can remember."""
    if not isinstance(value, int) or value < 2:
        raise ValueError(
            f"Expected window >= 2, an int, got {value!r}. It is the shape of the"
            " state: under `optax.inject_hyperparams` name it in `static_args`."
        )


def threshold(value: Any, what: str, minimum: float = 0.0) -> None:
    """Raises unless ``value`` is a number, a schedule, a rule or maps to those."""
    if isinstance(value, Mapping):
        mapping(value, what, functools.partial(threshold, minimum=minimum))
    elif isinstance(value, optax.GradientTransformation):
        mistakes.rule(value, what)
    elif callable(value):
        mistakes.uncalled(value, what, THRESHOLD)
        if minimum == 0:
            mistakes.schedule(value, what)
    else:
        number(value, what, minimum, kinds=THRESHOLD)


def is_endless(value: Any) -> bool:
    """Returns whether ``value`` is known to allow all: an infinity in Python."""
    return isinstance(value, STATIC) and float(value) == math.inf


def not_off(value: Any) -> None:
    """Warns of a number 0, which elsewhere means no clipping, and here no updates.

    A traced one, a schedule and an entry of a mapping may be 0 silently.
    """
    if isinstance(value, STATIC) and np.ndim(value) == 0 and value == 0:
        mistakes.warn(
            "Got a threshold of 0, which makes all updates zero. To switch a clip off,"
            " use `jnp.inf`; for zeros on purpose, `optax.set_to_zero()`."
        )


def mapping(
    value: Mapping[Any, Any], what: str, check: Callable[[Any, str], None]
) -> None:
    """Raises unless ``value`` maps something to thresholds; paths come later."""
    if not value:
        raise ValueError(
            f"Expected {what} to map path patterns to thresholds, got an empty mapping."
        )
    for pattern, entry in value.items():
        if isinstance(entry, Mapping):
            raise TypeError(
                f"Expected {what}[{pattern!r}] to be a threshold, got a mapping."
                " Write one flat mapping from paths such as 'encoder/dense'."
            )
        check(entry, f"{what}[{pattern!r}]")


def own_state(value: Any, kind: type, params: Any) -> Any:
    """Returns ``value`` if it is the state of this clip, None if it is no clip's.

    Callers pass along what Optax's clips never read: ``optax.EmptyState()``, a whole
    train state. Only what is surely a mistake raises: the state of another clip, and
    that of any clip in the place of the params.
    """
    if isinstance(value, kind):
        return value
    if _is_ours(value) or _is_ours(params):
        raise TypeError(_other(value, kind))
    return None


def came(value: Any) -> str:
    """Returns what was given for a state, in words."""
    return "none" if value is None else f"a {type(value).__name__}"


def _is_ours(value: Any) -> bool:
    """Returns whether ``value`` is a state of this library."""
    is_named = isinstance(value, tuple) and hasattr(value, "_fields")
    return is_named and type(value).__module__.startswith("optaxclip.")


def _other(value: Any, kind: type) -> str:
    return (
        f"Expected a state of type {kind.__name__}, got {type(value).__name__}: it"
        " belongs to another clip. Call `state = clip.init(params)`, and"
        " `clip.update(updates, state, params)` in this order."
    )


def needed_state(value: Any, kind: type) -> None:
    """Raises unless ``value`` is the state of this kind, which is never left out."""
    if value is not None and not isinstance(value, kind):
        raise TypeError(_other(value, kind))
    if value is None:
        raise ValueError(
            f"Expected a state of type {kind.__name__}, got None. Call `state ="
            " tx.init(params)` once and pass the state along."
        )


def function(value: Any, what: str) -> Any:
    """Returns ``value`` if it can be called, and raises otherwise."""
    if not callable(value):
        raise TypeError(f"Expected {what} to be a function, got {value!r}.")
    return value


def rule(value: Any, what: str) -> optax.GradientTransformation:
    """Returns ``value`` if it is a rule, and raises otherwise."""
    if not isinstance(value, optax.GradientTransformation):
        raise TypeError(
            f"Expected {what} to wrap a rule, an `optax.GradientTransformation` on"
            f" norms, got {_came(value)}"
        )
    mistakes.rule(value, f"what {what} wraps")
    return value


def transformation(
    value: Any, what: str, example: str
) -> optax.GradientTransformationExtraArgs:
    """Returns ``value`` if it is a transformation, and raises otherwise."""
    if not isinstance(value, optax.GradientTransformation):
        raise TypeError(
            f"Expected `{what}` to be a transformation, such as `{example}`, got"
            f" {_came(value)}"
        )
    return optax.with_extra_args_support(value)


def _came(value: Any) -> str:
    return mistakes.itself(value) or f"{value!r} of type {type(value).__name__}."


def _unfit(value: Any, what: str, kinds: str, remedy: str) -> str:
    kind = type(value).__name__
    if isinstance(value, optax.GradientTransformation):
        return f"Expected {what} to be {kinds}, got a {kind}. {mistakes.CHAIN}"
    came = mistakes.itself(value) or f"{value!r} of type {kind}.{remedy}"
    return f"Expected {what} to be {kinds}, got {came}"
