"""How are statistics read by name, at no cost to the step that made them?

Inside ``jit`` they stay the vectors that the states hold. On the host these come over
in one piece, and only there they become a number for each name.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optaxclip._measure import names as _names
from optaxclip._trees import paths as _paths

Fields = dict[str, Any]  # of a state, by name


class Column(NamedTuple):
    """A statistic: one number, or one for each scope, along the last axis."""

    key: str
    values: Any
    ids: Any = None  # of the scopes
    first: int = 0  # number of the first scope


class Part(NamedTuple):
    """What one clip or guard saw, less its memories.

    Attributes:
      prefix: what comes before the name of a statistic.
      suffix: what comes after it.
      columns: function from NumPy, or `jax.numpy`, and the fields to the statistics.
      fields: those of the state, by name.
    """

    prefix: str
    suffix: str
    columns: Callable[[Any, Fields], list[Column]]
    fields: Fields


@jax.tree_util.register_pytree_node_class
class Summary(Mapping[str, Any]):
    """Statistics by name, for :func:`optaxclip.summary`; a pytree of few arrays.

    It may be returned from ``jit``, ``vmap`` and ``scan``, which give every number
    further axes.
    """

    def __init__(self, parts: Sequence[Part], paths: tuple[str, ...]):
        """Takes what the clips saw, and the paths of the params."""
        self._parts, self._paths = tuple(parts), paths

    def __getitem__(self, key: str) -> Any:
        """Returns a statistic; while it is traced, also by the name of a scope."""
        if key not in self._rows and self._is_traced:
            for column in self._columns:
                if column.ids is not None and key.startswith(column.key + "/"):
                    return _found(column, key[len(column.key) + 1 :], self._paths)
        return self._rows[key]

    def __iter__(self) -> Iterator[str]:
        """Yields the names; of what is traced, scopes by their numbers."""
        return iter(self._rows)

    def __len__(self) -> int:
        """Returns how many statistics there are."""
        return len(self._rows)

    def __repr__(self) -> str:
        """Returns what a dictionary would show."""
        return repr(self._rows)

    def tree_flatten(self) -> tuple[Any, Any]:
        """Returns the arrays, and what is static."""
        static = tuple((x.prefix, x.suffix, x.columns) for x in self._parts)
        return [part.fields for part in self._parts], (static, self._paths)

    @classmethod
    def tree_unflatten(cls, static: Any, fields: Any) -> "Summary":
        """Inverts `tree_flatten`."""
        parts, paths = static
        pairs = zip(parts, fields, strict=True)
        return cls([Part(x, y, columns, z) for (x, y, columns), z in pairs], paths)

    def fetched(self) -> "Summary":
        """Returns the same on the host, before somebody donates its arrays."""
        return self if self._is_traced else jax.device_get(self)

    def named(self, params: Any) -> "Summary":
        """Returns the same, whose scopes have the names that they have in params."""
        return Summary(self._parts, tuple(_paths.paths(params)))

    @functools.cached_property
    def _is_traced(self) -> bool:
        return any(isinstance(x, Tracer) for x in jax.tree.leaves(self))

    @functools.cached_property
    def _columns(self) -> list[Column]:
        every = [part.fields for part in self._parts]
        xp = jnp if self._is_traced else np
        every = every if self._is_traced else jax.device_get(every)
        return [
            column._replace(key=f"{part.prefix}/{column.key}{part.suffix}")
            for part, fields in zip(self._parts, every, strict=True)
            for column in part.columns(xp, fields)
        ]

    @functools.cached_property
    def _rows(self) -> dict[str, Any]:
        rows = {}
        for key, values, ids, first in self._columns:
            if ids is None:
                rows[key] = values
                continue
            names = [str(first + i) for i in range(values.shape[-1])]
            if not self._is_traced and ids.size:
                one = ids.reshape(-1, *ids.shape[-2:])[0]  # the same at every step
                names = _decoded(one.astype(int).tobytes(), first, self._paths)
            for i, name in enumerate(names):
                rows[f"{key}/{name}".removesuffix("/")] = values[..., i]
        return {key: value[()] for key, value in rows.items()}  # a scalar, if it is one


@functools.lru_cache(maxsize=32)
def _known(paths: tuple[str, ...]) -> dict[tuple[int, int], str]:
    return _names.candidates(paths) if paths else {}


@functools.lru_cache(maxsize=32)
def _decoded(ids: bytes, first: int, paths: tuple[str, ...]) -> list[str]:
    rows = np.frombuffer(ids, int).reshape(-1, 4)
    return _names.decoded(rows.tolist(), _known(paths), first)


def _found(column: Column, name: str, paths: tuple[str, ...]) -> jax.Array:
    """Returns the number of a scope by its name, NaN if there is no such scope."""
    rows = [x for x in _names.readings(name) if x[:2] in _known(paths)]
    if not rows:
        raise KeyError(f"{column.key}/{name}")
    is_it = jnp.any(
        jnp.all(column.ids[..., None, :] == jnp.array(rows), axis=-1), axis=-1
    )
    found = jnp.sum(jnp.where(is_it, column.values, 0), axis=-1)
    return jnp.where(jnp.any(is_it, axis=-1), found, jnp.nan)
