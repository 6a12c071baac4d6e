"""What a scope is called, and how a state says so without a string.

A clip learns the paths of its scopes when its ``init`` sees the params. Its state keeps
a fingerprint of each, by which `summary` finds the name among the paths of the params:
a name is right, or there is none.
"""

import collections
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._trees import paths as _paths

_NOBODY = (0, 0, 0, 0)  # of a scope without a name
ROOT = "root"  # the layer of leaves that are in no module


class Name(NamedTuple):
    """The path of a leaf or a module, and of a stack of layers which one of them."""

    path: str
    depth: int = -1  # after so many parts comes the layer's number; -1: there is none
    layer: int = 0

    def __str__(self) -> str:
        """Returns the path with the layer's number in it."""
        parts = self.path.split("/")
        if self.depth < 0:
            return self.path
        number = str(self.layer)
        return "/".join([*parts[: self.depth], number, *parts[self.depth :]])


Names = Sequence[Name | None]


def of_scopes(scopes: Sequence[Sequence[int]], paths: Sequence[str]) -> Names:
    """Returns the name of each scope: that of its leaf, or of the subtree it is."""
    inside: dict[str, list[int]] = {}
    for i, path in enumerate(paths):
        for prefix in _prefixes(path):
            inside.setdefault(prefix, []).append(i)
    outer_first = sorted(inside, key=len)  # of two that hold the same, the inner counts
    known = {tuple(inside[prefix]): prefix for prefix in outer_first}
    known |= {(i,): path for i, path in enumerate(paths)}
    found = [known.get(tuple(sorted(scope))) for scope in scopes]
    return [None if path is None else Name(path) for path in found]


def of_layer(
    path: str | None, stack: tuple[str, int] | None, layer: int
) -> Name | None:
    """Returns the name of a scope, which in a stack is that of one layer.

    Args:
      path: of the scope, if it has one.
      stack: path of the module that there are many of, and how many parts that is.
      layer: its number.
    """
    if path is None or stack is None:
        return None if path is None else Name(path)
    root, depth = stack
    is_inside = not root or path == root or path.startswith(root + "/")
    return Name(path, depth, layer) if is_inside else None


def encoded(names: Names | None) -> jax.Array:
    """Returns four whole numbers for each name, int32; one row without for all leaves.

    Below 2**24, so that they survive a blend of states in float32.
    """
    if names is None:
        return jnp.zeros(4, jnp.int32)
    rows = [_NOBODY if name is None else _row(name) for name in names]
    return jnp.asarray(np.array(rows, np.int32).reshape(-1, 4))


def candidates(paths: Sequence[str]) -> dict[tuple[int, int], str]:
    """Returns all paths that a name may have, by their fingerprints."""
    layers = {_paths.layer(path) for path in paths}
    modules = {x for path in (*paths, *layers) for x in _prefixes(path)}
    every = {ROOT, *paths, *layers, *modules}
    return {_fingerprint(path): path for path in every}


def decoded(
    rows: Sequence[Sequence[int]], known: dict[tuple[int, int], str], first: int = 0
) -> list[str]:
    """Returns what to call each scope: its name, or else its number."""
    names = []
    for number, row in enumerate(rows, first):
        path = known.get((row[0], row[1]))
        name = None if path is None else Name(path, row[2] - 1, row[3])
        names.append(str(number) if name is None else str(name))
    count = collections.Counter(names)
    pairs = enumerate(names, first)
    return [x if count[x] == 1 else str(number) for number, x in pairs]


def readings(text: str) -> list[tuple[int, ...]]:
    """Returns the numbers of all names that are written like this."""
    parts = text.split("/")
    layers = [i for i, part in enumerate(parts) if part.isdecimal()]
    rests = ["/".join(parts[:i] + parts[i + 1 :]) for i in layers]
    stacked = [Name(x, i, int(parts[i])) for i, x in zip(layers, rests, strict=True)]
    return [_row(name) for name in (Name(text), *stacked)]


def _row(name: Name) -> tuple[int, ...]:
    return (*_fingerprint(name.path), name.depth + 1, name.layer)


def _fingerprint(path: str) -> tuple[int, int]:
    digest = hashlib.blake2b(path.encode(), digest_size=6).digest()
    return int.from_bytes(digest[:3]), int.from_bytes(digest[3:])


def _prefixes(path: str) -> list[str]:
    """Returns the paths of the modules that a leaf is in."""
    parts = path.split("/")
    return ["/".join(parts[:n]) for n in range(1, len(parts))]
