"""Which leaf is meant: readable paths, and the patterns that name them.

A leaf's path is written ``a/b/c``. A pattern names a leaf or a whole subtree and may
begin at any module boundary; a leading ``/`` anchors it at the root, ``*`` stands for
one part or a piece of one, ``**`` for any number of parts. Of several patterns that
match a leaf the most specific one wins, so their order never matters.

Flat names, as converted checkpoints have them, are paths too: where the last key has a
dot in it, ``layers.3.weight``, dots separate modules as slashes do, in the path and in
patterns. A dot in the name of a module with leaves below it separates nothing.
"""

import collections
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jax.tree_util import GetAttrKey, KeyPath, keystr, tree_leaves_with_path

ANY_PARTS = "(?:[^/]+/)*"  # a regular expression

# Parts without a `*`, with a piece of one, `*` alone.
Specificity = tuple[int, int, int]


def paths(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[str]:
    """Returns the path of every leaf of ``tree``, in tree order."""
    keypaths = [path for path, _ in tree_leaves_with_path(tree, is_leaf=is_leaf)]
    families = collections.Counter(keypath[:-1] for keypath in keypaths)
    return [
        _path(keypath, only_child=families[keypath[:-1]] == 1) for keypath in keypaths
    ]


def layer(path: str) -> str:
    """Returns the module path of a leaf: its path without the last part."""
    parent, slash, last = path.rpartition("/")
    module = last.rpartition(".")[0]
    return parent + slash + module if module else parent


def resolve(
    patterns: Iterable[str], paths: Sequence[str], what: str
) -> list[str | None]:
    """Returns the winning pattern of each path, None where no pattern matches.

    Raises:
      TypeError, ValueError: a pattern is not a string or is empty, matches nothing, or
        two equally specific ones match one leaf. ``what`` names the argument in the
        message.
    """
    found = winners(patterns, paths, what)
    matching(patterns, paths, what)
    return found


def winners(
    patterns: Iterable[str], paths: Sequence[str], what: str
) -> list[str | None]:
    """Returns the winning pattern of each path; some may match nothing."""
    patterns = sorted(patterns, key=_checked)
    return [_most_specific(patterns, path, what) for path in paths]


def depth(pattern: str, path: str) -> int:
    """Returns how many parts of a path name the module that a pattern matches."""
    parts = path.split("/")
    module = pattern.rstrip("*").rstrip("/") if pattern.endswith("**") else pattern
    lengths = range(len(parts) + 1)
    prefixes = {n: "/".join(parts[:n]) for n in lengths}
    return next(n for n in lengths if _matches(module, prefixes[n], below=""))


def matching(patterns: Iterable[str], paths: Sequence[str], what: str) -> list[bool]:
    """Returns of each path whether any pattern matches it.

    Raises:
      TypeError, ValueError: as `resolve`, but patterns may overlap.
    """
    patterns = [_checked(pattern) for pattern in patterns]
    for pattern in patterns:
        if paths and not any(_matches(pattern, path) for path in paths):
            raise ValueError(
                f"Every pattern of {what} has to match a leaf: {pattern!r} matches"
                f" none. {_listing(paths)}"
            )
    return [any(_matches(pattern, path) for pattern in patterns) for path in paths]


def of_layer(patterns: Iterable[str], path: str, what: str) -> str | None:
    """Returns the winning pattern of a module itself, not of what is below it.

    The pattern "/" names the model as a whole, whose path is empty.

    Raises:
      ValueError: two equally specific patterns match the module.
    """
    return _most_specific(list(patterns), path, what, below="")


def check_layers(patterns: Iterable[Any]) -> None:
    """Raises unless all patterns are strings that can name a module."""
    for pattern in patterns:
        if pattern != "/":
            _checked(pattern)


def cover(patterns: Iterable[str], paths: Sequence[str], what: str) -> list[str]:
    """Returns the winning pattern of each path; every path needs one."""
    patterns = list(patterns)
    found = resolve(patterns, paths, what)
    for path, winner in zip(paths, found, strict=True):
        if winner is None:
            raise ValueError(
                f"Every leaf needs an entry in {what}: no pattern matches {path!r}."
                f" Patterns: {sorted(patterns)}. Add '**' to cover the rest."
            )
    return [winner for winner in found if winner is not None]


def _path(keypath: KeyPath, only_child: bool) -> str:
    """Drops the `value` of nnx Variables and linen boxes, which updates lack."""
    if only_child and len(keypath) > 1 and keypath[-1] == GetAttrKey("value"):
        keypath = keypath[:-1]
    return keystr(keypath, simple=True, separator="/")


def _checked(pattern: Any) -> str:
    if not isinstance(pattern, str):
        raise TypeError(
            f"Expected path patterns such as 'encoder/*', got {pattern!r} of type"
            f" {type(pattern).__name__}. Write the leaf's path as a string."
        )
    if not pattern.strip("/."):
        raise ValueError(
            f"Expected path patterns such as 'encoder/*', got {pattern!r}."
            " Write '**' to mean every leaf."
        )
    return pattern


def _most_specific(
    patterns: list[str], path: str, what: str, below: str = ANY_PARTS
) -> str | None:
    matching = [pattern for pattern in patterns if _matches(pattern, path, below)]
    if not matching:
        return None
    ranks = [_specificity(pattern, _separators(path)[-1]) for pattern in matching]
    pairs = zip(matching, ranks, strict=True)
    winners = [pattern for pattern, rank in pairs if rank == max(ranks)]
    if len(winners) > 1:
        raise ValueError(
            f"Expected one most specific pattern for {path!r} in {what}, got"
            f" {winners}, which are equally specific. Write more of the path in one."
        )
    return winners[0]


def _matches(pattern: str, path: str, below: str = ANY_PARTS) -> bool:
    return any(_fits(pattern, path, some, below) for some in _separators(path))


def _fits(pattern: str, path: str, separators: str, below: str) -> bool:
    parts = "".join(part + "/" for part in _parts(path, separators))
    middle = [
        ANY_PARTS if part == "**" else re.escape(part).replace(r"\*", "[^/]*") + "/"
        for part in _parts(pattern, separators)
    ]
    start = "" if pattern.startswith("/") else ANY_PARTS
    return re.fullmatch(start + "".join(middle) + below, parts) is not None


def _specificity(pattern: str, separators: str) -> Specificity:
    parts = [part for part in _parts(pattern, separators) if part != "**"]
    literal = sum("*" not in part for part in parts)
    alone = sum(part == "*" for part in parts)
    return literal, len(parts) - literal - alone, alone


def _separators(path: str) -> tuple[str, ...]:
    """Returns what may separate the parts of a path; the last finds the most parts."""
    return ("/", "/.") if "." in path.rpartition("/")[2] else ("/",)


def _parts(path: str, separators: str) -> list[str]:
    return [part for part in re.split(f"[{separators}]", path) if part]


def _listing(paths: Sequence[str], most: int = 20) -> str:
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return f"The leaves are {list(paths[:most])}{more}."
