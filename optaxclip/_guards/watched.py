"""What a guard watches: the loss, and a norm by a threshold that goes by the past."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from optaxclip import thresholds
from optaxclip._mesh import collectives

_NAMES = re.compile(r"(\w+_)?(loss|losses)(_value|_val)?")  # but no `loss_scale`


def check_name_of_loss(extra_args: dict[str, Any]) -> None:
    """Raises where a loss comes by another name than that which guards look at."""
    if extra_args.get("value") is not None:
        return
    for name in extra_args:
        if _NAMES.fullmatch(name):
            raise TypeError(
                f"Expected the loss as `value=`, got `{name}=`, which nobody looks"
                f" at. Call `update(updates, state, params, value={name})`."
            )


def detached(tree: Any) -> Any:
    """Returns the same without a derivative, which a decision has none of."""

    def one(x: Any) -> Any:
        return jax.lax.stop_gradient(x) if isinstance(x, Tracer) else x

    return jax.tree.map(one, tree)


def with_detached_loss(extra_args: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments, of the loss the number alone."""
    if "value" not in extra_args:
        return extra_args
    return extra_args | {"value": detached(extra_args["value"])}


def loss(extra_args: dict[str, Any]) -> jax.Array:
    """Returns it; raises where there is none, or more than one number."""
    value = extra_args.get("value")
    if value is None:
        raise ValueError(
            "Expected the loss, which this guard watches, got none. Call"
            " `update(updates, state, params, value=loss)`."
        )
    value = jnp.asarray(value)
    axes = collectives.varying_axes(value)
    if value.shape != () or axes:
        raise ValueError(
            "Expected the loss to be one number, the same on all devices, got shape"
            f" {value.shape}, different over the mesh axes {sorted(axes)}. Call"
            " `jax.lax.pmean` on it."
        )
    return value


def is_finite_everywhere(value: Any) -> jax.Array:
    """Returns whether a loss is, on all devices."""
    manual = frozenset(collectives.manual_axes())
    return ~collectives.anywhere(~jnp.all(jnp.isfinite(value)), manual)


def is_learnt(threshold: Any) -> bool:
    """Returns whether any of it is a rule."""
    if isinstance(threshold, Mapping):
        return any(map(is_learnt, threshold.values()))
    return isinstance(threshold, optax.GradientTransformation)


def by_the_past(threshold: Any) -> Any:
    """Makes rules go by the steps before this one."""
    if isinstance(threshold, optax.GradientTransformation):
        return thresholds.lagged(threshold)
    if isinstance(threshold, Mapping):
        return {pattern: by_the_past(entry) for pattern, entry in threshold.items()}
    return threshold
