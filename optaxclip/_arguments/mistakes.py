"""What was meant? Mistakes that else end in silence, or in the words of Python and JAX.

Nothing here is asked at a step: all of it is known when a clip is built, or traced.
"""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

ONCE = (
    "Make a clip once and use it in `optax.chain`, or by `clip.update(updates, state)`."
    " A function of updates is `optaxclip.clip_with_norm`."
)
CHAIN = (
    "Clips are no wrappers, they are put in a chain: `optax.chain(clip,"
    " optax.adam(1e-3))`."
)

_P = ParamSpec("_P")
_R = TypeVar("_R")


def uncalled(value: Any, what: str, kinds: str) -> None:
    """Raises for a function where what it returns was meant, as in `z_score`.

    Functions at the top level of Optax and of this library are none that a user passes;
    what those return, such as a schedule, is local to them. Nor is a class.
    """
    if told := itself(value):
        raise TypeError(f"Expected {what} to be {kinds}, got {told}")


def itself(value: Any) -> str:
    """Returns what to say of a function that has to be called, else nothing."""
    if isinstance(value, type) or _is_of(value, "optax") or _is_of(value):
        return f"{_qualname(value)!r} itself. {_remedy(value)}"
    return ""


def schedule(value: Any, what: str) -> None:
    """Raises for a schedule of Optax that begins or ends below 0.

    Those are asked when a clip is built, but for `join_schedules`, whose parts may be
    the user's own: a line that falls is right as long as a run ends in time.
    """
    made_by = _qualname(value).partition(".")[0]
    if _module(value).partition(".")[0] != "optax" or made_by == "join_schedules":
        return
    for count in (0, 2**30):
        with jax.ensure_compile_time_eval(), jax.numpy_dtype_promotion("standard"):
            now = value(jnp.asarray(count, jnp.int32))
        if not isinstance(now, Tracer) and float(now) < 0:
            raise ValueError(
                f"Expected a schedule of {what} >= 0, got `{made_by}`, which gives"
                f" {float(now):g} at step {count}."
            )


def makes(value: Any) -> bool:
    """Returns whether it has to be called, and is no function of updates itself."""
    if not inspect.isfunction(value):
        return isinstance(value, type)
    first = next(iter(inspect.signature(value).parameters), "")
    return itself(value) != "" and first not in ("updates", "tree")


def norm(value: Any) -> None:
    """Raises for a function of this library that is no norm, as `group_norms` is none.

    A norm is a function of updates, which needs nothing else.
    """
    is_other = _is_of(value) and _needed(value) != ["updates"]
    is_other |= _is_of(value, "optax") and not {"updates", "tree"} >= {*_needed(value)}
    if is_other or isinstance(value, type):
        raise TypeError(
            "Expected a norm, a function of updates such as `norms.global_norm`, got"
            f" {value.__qualname__!r} itself. {_remedy(value, 'norms')}"
        )


def factor(value: Any) -> None:
    """Raises for a function of this library that is no factor."""
    is_other = _is_of(value) and value.__module__ != "optaxclip.factors"
    if is_other or isinstance(value, type):
        raise TypeError(
            "Expected a factor, a function of norms and thresholds such as"
            f" `factors.rescale`, got {value.__qualname__!r} itself. {_remedy(value)}"
        )


def rule(value: optax.GradientTransformation, what: str) -> None:
    """Raises for a clip or an optimizer in the place of a rule.

    An optimizer goes downhill: for a norm of 1 it returns a negative number, or -0.0
    where its learning rate starts at 0. A threshold is positive. Of all others only
    what Optax made is asked, for that is known to do nothing else.
    """
    if _qualname(value.init).startswith(makes_rule.__qualname__):
        return
    package = _module(value.update).partition(".")[0]
    allowed = _first(value) if package == "optax" else None
    if allowed is not None and np.signbit(allowed).any():
        came = f"what makes {np.min(allowed):g} of a norm of 1, as an optimizer does"
    elif package == "optaxclip":
        came = "a clip or another transformation of this library that is none"
    else:
        return
    raise TypeError(
        f"Expected {what} to be a rule, which returns the largest norms allowed, got"
        f" {came}. {CHAIN}"
    )


def _first(value: optax.GradientTransformation) -> np.ndarray | None:
    """Returns what a rule allows norms of 1, None if it says so only of real ones.

    Asked without compiling first: one that needs params of the shape of updates raises.
    """

    def ask(norms: jax.Array) -> Any:
        update = optax.with_extra_args_support(value).update
        loss = {"value": 1.0, "grad": norms, "value_fn": jnp.sum}
        return update(norms, value.init(norms), norms, **loss)[0]

    try:
        with jax.ensure_compile_time_eval(), jax.numpy_dtype_promotion("standard"):
            jax.eval_shape(ask, np.ones(2, np.float32))
            allowed = ask(jnp.ones(2))
        return None if isinstance(allowed, Tracer) else np.asarray(allowed, float)
    except Exception:  # whatever a function of the user's own raises
        return None


def makes_rule(
    maker: Callable[_P, optax.GradientTransformationExtraArgs],
) -> Callable[_P, optax.GradientTransformationExtraArgs]:
    """Makes rules say what to do where they are put in a chain, and begin with params.

    So they can be told from clips, too.
    """

    @functools.wraps(maker)
    def checked(
        *args: _P.args, **kwargs: _P.kwargs
    ) -> optax.GradientTransformationExtraArgs:
        made = maker(*args, **kwargs)

        def init_fn(params: Any) -> Any:
            _check_norms(params, maker.__name__)
            return made.init(params)

        return optax.GradientTransformationExtraArgs(init_fn, made.update)

    return checked


def _check_norms(params: Any, name: str) -> None:
    if jax.tree.structure(params) != jax.tree.structure(0) or np.ndim(params) > 1:
        raise TypeError(
            f"Expected norms, a number or a vector, for the rule `{name}`, got params:"
            f" {type(params).__name__}. A rule is no clip, but the threshold of one:"
            f" `optaxclip.clip_by_global_norm(optaxclip.thresholds.{name}(...))`."
        )


def at_most(count: int, remedy: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Makes a function say what to do where it is called with too many arguments."""

    def decorated(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            if len(args) > count:
                names = ", ".join(inspect.signature(function).parameters)
                raise TypeError(
                    f"Expected `{function.__name__}({names})`, got {len(args)}"
                    f" arguments. {remedy}"
                )
            return function(*args, **kwargs)

        return checked

    return decorated


def warn(text: str) -> None:
    """Warns where this library was called from."""
    frame, level = inspect.currentframe(), 1
    while frame and frame.f_globals.get("__name__", "").startswith("optaxclip."):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


def _is_of(value: Any, package: str = "optaxclip") -> bool:
    """Returns whether it is a function at the top level of a module of a package."""
    if not inspect.isfunction(value) or value.__name__ != value.__qualname__:
        return False
    return _module(value).partition(".")[0] == package


def _module(value: Any) -> str:
    return getattr(value, "__module__", None) or ""


def _qualname(value: Any) -> str:
    return getattr(value, "__qualname__", None) or type(value).__qualname__


def _needed(value: Callable[..., Any]) -> list[str]:
    """Returns the arguments that have to be given."""
    every = inspect.signature(value).parameters.values()
    return [x.name for x in every if x.default is x.empty]


def _remedy(value: Any, instead: str = "") -> str:
    module = value.__module__.removeprefix("optaxclip.")
    if module in ("norms", "factors") and module != instead:
        return (
            f"It is one of the {module}; the order is `clip_by(norm, threshold,"
            " factor)`."
        )
    return f"Call it first, `{value.__name__}(...)`, and pass what it returns."
