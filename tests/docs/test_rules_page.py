"""The table of all rules says what the code does."""

import ast
import functools
import inspect
import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import helpers
import optaxclip
from helpers import oc
from optaxclip import factors, norms, thresholds

DOCS = pathlib.Path(__file__).parents[2] / "docs"
COLUMNS = ["call", "norm", "threshold", "factor", "state", "take it", "source"]

# Public functions that are no rules: {name: what they are}.
NO_RULES = {
    "carry_over": "turns an old state into a new one",
    "clip_by": "makes all those that aren't flat",
    "cotangent_stats": "a dummy parameter",
    "diagnose": "reads a history",
    "global_norm": "a norm",
    "history": "reads statistics",
    "keep_if_skipped": "goes by what a guard did",
    "live": "shows a history",
    "over_axes": "tells a clip how leaves are split",
    "over_layers": "tells a clip which arrays are stacks of layers",
    "record": "keeps statistics",
    "report": "shows a history",
    "status": "shows statistics",
    "suggest_max_norm": "a number for a threshold",
    "summary": "reads statistics",
}

# --------------------------------------------------------------------------------------
# The rows
# --------------------------------------------------------------------------------------


class Row(NamedTuple):
    call: str
    norm: str
    threshold: str
    factor: str
    state: str
    purpose: str
    source: str


def table(text: str) -> list[Row]:
    """The rows of all tables; each has the same columns."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    rules = [row for row in cells if row != COLUMNS and set(row) != {"---"}]
    return [Row(row[0].strip("`"), *row[1:]) for row in rules]


EVERY = table((DOCS / "rules.md").read_text(encoding="utf-8"))
ROWS = {row.call.partition("(")[0]: row for row in EVERY}


def every_row(rows=ROWS):
    return pytest.mark.parametrize("name", list(rows))


def function(name: str) -> Any:
    return functools.reduce(getattr, name.split("."), optaxclip)


def functions_of(module: Any, prefix: str = "") -> set[str]:
    """The public ones, as far as they are ours."""
    members = inspect.getmembers(module, inspect.isfunction)
    return {
        prefix + name
        for name, member in members
        if not name.startswith("_") and member.__module__.startswith("optaxclip")
    }


def squared_error(params, x):
    return jnp.sum((params["w"] * x) ** 2)


def examples_seen():
    grad_fn = oc.per_example_clipped_grad(squared_error, 1.0)
    return grad_fn({"w": jnp.ones(2)}, jnp.ones((3, 2)))[1]


@functools.cache
def arguments() -> dict[str, Any]:
    """What the names in the calls stand for."""
    updates = {"w": jnp.array([3.0, 4.0])}
    return vars(optaxclip) | {
        "jnp": jnp,
        "inner": optax.identity(),
        "clip": oc.clip_by_global_norm(1.0),
        "rule": thresholds.mean_plus_std(3.0, decay=0.9),
        "norm": norms.global_norm,
        "updates": updates,
        "center": updates,
        "stacked": {"w": jnp.ones((3, 2))},
        "x": jnp.ones(2),
        "query": jnp.ones((4, 2, 3)),
        "key": jnp.ones((4, 2, 3)),
        "max_logits": jnp.ones(2),
        "loss_fn": squared_error,
        "seen": examples_seen(),
    }


@functools.cache
def made(name: str) -> Any:
    """The value of a row's call."""
    known = dict(arguments())
    if name == "clip":  # the function, in this row alone
        known["clip"] = oc.clip
    if name == "clip_with_norm":
        known["norm"] = 5.0
    return eval(ROWS[name].call, known)


# --------------------------------------------------------------------------------------
# Which there are, and what they are called with
# --------------------------------------------------------------------------------------


def test_every_rule_has_one_row_and_every_row_a_rule():
    public = functions_of(optaxclip) | functions_of(thresholds, "thresholds.")
    rules = [row.call.partition("(")[0] for row in EVERY]
    assert public >= NO_RULES.keys()
    assert sorted(rules) == sorted(public - NO_RULES.keys())


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@every_row()
def test_a_row_names_the_defaults(name):
    """All numbers among them, and what has no default but None is the row's choice."""
    parameters = inspect.signature(function(name)).parameters
    defaults = {key: p.default for key, p in parameters.items()}
    (call,) = ast.parse(ROWS[name].call).body
    assert isinstance(call, ast.Expr) and isinstance(call.value, ast.Call)
    named = {
        str(keyword.arg): eval(ast.unparse(keyword.value), arguments())
        for keyword in call.value.keywords
    }
    numbers = {key for key, default in defaults.items() if is_number(default)}
    assert numbers <= named.keys()
    chosen = {key for key in named if defaults[key] is None}
    assert {key: defaults[key] for key in named.keys() - chosen} == {
        key: value for key, value in named.items() if key not in chosen
    }


@every_row()
def test_the_source_of_a_row_is_that_of_the_docstring(name):
    links = re.findall(r"\((https:[^)]+)\)", ROWS[name].source)
    docstring = inspect.getdoc(function(name)) or ""
    assert links == list(dict.fromkeys(re.findall(r"https://arxiv[^>\s]+", docstring)))


# --------------------------------------------------------------------------------------
# What they keep
# --------------------------------------------------------------------------------------

# Trees that tell elements, columns, leaves and layers apart.
TREES = [
    helpers.SHAPES,
    {
        "a": {"x": (5,), "y": (2, 3, 4), "z": ()},
        "b": {"x": (7, 2)},
        "c": {"x": (1,), "y": (6, 6)},
    },
]
PER = {
    "element": lambda shapes: sum(int(np.prod(shape)) for shape in shapes),
    "column": lambda shapes: sum(
        int(np.prod(shape[:-2])) * shape[-1] if len(shape) > 1 else 1
        for shape in shapes
    ),
    "leaf": len,
}


def size(state: Any) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(state))


def stated(state: str, tree: Any, init: Any) -> int:
    """The size that a row names, of which each part is `n` or `n per something`."""
    if state == "none":
        return 0
    shapes = jax.tree.leaves(tree, is_leaf=helpers.is_shape)
    counts = {key: count(shapes) for key, count in PER.items()}
    counts |= {"group": len(tree), "scope": len(shapes), "": 1}
    total = 0
    for part in state.split(" + "):
        inner = re.fullmatch(r"that of `(\w+)`", part)
        if inner:
            total += init(arguments()[inner[1]])
        else:
            found = re.fullmatch(r"([\d,]+)(?: per (\w+))?", part)
            assert found, f"{part!r} is no size"
            total += int(found[1].replace(",", "")) * counts[found[2] or ""]
    return total


@pytest.mark.parametrize("tree", TREES, ids=["two layers", "three layers"])
@every_row()
def test_a_row_names_the_size_of_the_state(name, tree):
    """That of a rule is for norms of leaves."""
    is_rule = name.startswith("thresholds.")
    shapes = jax.tree.leaves(tree, is_leaf=helpers.is_shape)
    params = jnp.zeros(len(shapes)) if is_rule else helpers.random_tree(shapes=tree)

    def init(transformation: Any) -> int:
        return size(jax.eval_shape(transformation.init, params))

    transformation = made(name)
    keeps = isinstance(transformation, optax.GradientTransformation)
    assert stated(ROWS[name].state, tree, init) == (
        init(transformation) if keeps else 0
    )


# --------------------------------------------------------------------------------------
# What they measure, and what they do about it
# --------------------------------------------------------------------------------------


def in_code(cell: str, module: Any) -> str | None:
    """The name in a cell that is one of the module's functions and nothing else."""
    found = re.fullmatch(r"`(\w+)(\(\))?`", cell)
    return found[1] if found and hasattr(module, found[1]) else None


FILES = "by_norm", "learnt_global", "learnt_per_leaf", "by_params"
MODULES = [f"optaxclip._clips.{x}" for x in FILES]
CLIPS = {
    name: row
    for name, row in ROWS.items()
    if in_code(row.norm, norms) and in_code(row.factor, factors)
    if function(name).__module__ in MODULES
    if name != "clip_with_norm"
}


@functools.cache
def steps() -> tuple[list[Any], dict[str, list[Any]]]:
    """Updates, and the state of every clip after each of them, in one program."""
    updates, params = helpers.updates_and_params()
    scaled = [jax.tree.map(lambda x, t=t: t * x, updates) for t in (1, 3, 0.01)]

    @jax.jit
    def states(scaled, params):
        found = {}
        for name in CLIPS:
            clip = made(name)
            state, found[name] = clip.init(params), []
            for updates in scaled:
                _, state = clip.update(updates, state, params)
                found[name].append(state)
        return found

    return scaled, states(scaled, params)


@every_row(CLIPS)
def test_a_clip_has_the_norm_and_the_factor_of_its_row(name):
    """Of units the state keeps one for each leaf."""
    scaled, states = steps()
    norm = eval(CLIPS[name].norm.strip("`"), dict(vars(norms)))
    factor = getattr(factors, str(in_code(CLIPS[name].factor, factors)))
    for updates, state in zip(scaled, states[name], strict=True):
        every, got = jax.tree.leaves(norm(updates)), np.ravel(state.norms)
        assert got.size == len({float(np.max(x)) for x in every})
        for value in got:
            assert any(np.isclose(x, value, rtol=1e-5).any() for x in every)
        free = np.isinf(helpers.shown(state.max_norms))
        expected = jnp.where(free, 1, factor(state.norms, state.max_norms))
        np.testing.assert_allclose(state.factors, expected, rtol=1e-5)
