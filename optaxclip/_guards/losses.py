"""The loss that a guard watches, and what it is called."""

import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from optaxclip._mesh import collectives

_NAMES = re.compile(r"(\w+_)?(loss|losses)(_value|_val)?")  # but no `loss_scale`


def check_names(extra_args: dict[str, Any]) -> None:
    """Raises where a loss comes by another name than that which guards look at."""
    if extra_args.get("value") is not None:
        return
    for name in extra_args:
        if _NAMES.fullmatch(name):
            raise TypeError(
                f"Expected the loss as `value=`, got `{name}=`, which no guard looks"
                f" at. Call `update(updates, state, params, value={name})`."
            )


def still(tree: Any) -> Any:
    """Returns the same without a derivative, which a decision has none of."""

    def one(x: Any) -> Any:
        return jax.lax.stop_gradient(x) if isinstance(x, Tracer) else x

    return jax.tree.map(one, tree)


def with_still_loss(extra_args: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments, of the loss the number alone."""
    if "value" not in extra_args:
        return extra_args
    return extra_args | {"value": still(extra_args["value"])}


def watched(extra_args: dict[str, Any]) -> jax.Array:
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
    manual = frozenset(jax.sharding.get_abstract_mesh().manual_axes)
    return ~collectives.anywhere(~jnp.all(jnp.isfinite(value)), manual)
