"""The staircase of the package: a wing imports only from those below it."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "optaxclip"
FLOORS = (  # from the ground
    *("_arguments", "_trees", "_mesh", "_measure", "norms", "factors"),
    *("_thresholds", "thresholds", "_engine", "_clips", "_guards"),
    *("_per_example", "_cotangents", "_looking", "_checkpoints"),
    *("_advice", "_plots", "plot", "_pages"),
    *("__init__", "__main__"),
)
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
every_file = pytest.mark.parametrize("file", FILES, ids=str)
every_wing = pytest.mark.parametrize("wing", [x for x in FLOORS[:-2] if x[0] == "_"])


def floor(file):
    return FLOORS.index(file.parts[0].removesuffix(".py"))


def imported(file):
    """The wings that a file imports from, and the modules of its own wing."""
    for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{file}: a relative import")
        if isinstance(node, ast.Import):
            assert not any(x.name.startswith("optaxclip") for x in node.names), file
        if isinstance(node, ast.ImportFrom):
            package, *inner = (node.module or "").split(".")
            if package == "optaxclip":
                for name in node.names:
                    yield Path(*inner, name.name) if len(inner) < 2 else Path(*inner)


@every_file
def test_a_wing_imports_only_from_those_below_it(file):
    own = file.parts[0]
    above = [x for x in imported(file) if x.parts[0] != own and floor(x) > floor(file)]
    assert not above


@every_wing
def test_inside_of_a_wing_no_import_runs_in_a_circle(wing):
    inside = {
        path.stem: {x.name for x in imported(path) if x.parts[0] == wing}
        for path in FILES
        if path.parts[0] == wing
    }
    while ground := [name for name, others in inside.items() if not others]:
        inside = {k: v - {*ground} for k, v in inside.items() if k not in ground}
    assert not inside


@every_wing
def test_a_wing_is_one_docstring_that_names_its_files(wing):
    text = (PACKAGE / wing / "__init__.py").read_text(encoding="utf-8")
    lines = re.findall(r"^  ([a-z_, ]+): ", text, re.MULTILINE)
    named = [name for line in lines for name in line.split(", ")]
    files = [path.stem for path in FILES if path.parts[0] == wing]
    assert sorted([*named, "__init__"]) == sorted(files)
    assert len(ast.parse(text).body) == 1
