"""Which number does a log mean by what it wrote?"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

Row = dict[str, float]

_NUMBER = re.compile(
    r"([-+]?(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)(?:\.\d*)?)([kmb]?)", re.IGNORECASE
)
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}


def numbers(row: Mapping[str, Any]) -> Row:
    """Returns what a row holds that is a number, under flat names."""
    found = {name: number(value) for name, value in flat(row)}
    return {name: value for name, value in found.items() if value is not None}


def flat(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yields what mappings in mappings hold, under the names that lead there."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{above}{key}/")
        else:
            yield f"{above}{key}", value


def number(value: Any) -> float | None:
    """Returns a number, as trainers write it: `1.5e3`, `1,500`, `2K`, `-inf`."""
    if isinstance(value, str):
        return _written(value.strip())
    if isinstance(value, int | float):
        return float(value)
    if not hasattr(value, "dtype") or np.ndim(value) or not is_numeric(value):
        return None
    return float(value)


def is_numeric(array: Any) -> bool:
    """Whether an array holds real numbers, of any dtype, bfloat16 too, or booleans."""
    kinds = jnp.floating, jnp.integer, jnp.bool_
    return any(jnp.issubdtype(array.dtype, kind) for kind in kinds)


def _written(text: str) -> float | None:
    try:
        return float(text)  # `NaN` and `-Infinity`, too
    except ValueError:
        found = _NUMBER.fullmatch(text)
        digits = found[1].replace(",", "") if found else ""
    return float(digits) * _UNITS[found[2].lower()] if found else None
