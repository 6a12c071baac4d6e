"""The examples are lessons: short, from top to bottom, each a file by itself."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LESSONS = sorted((ROOT / "examples").glob("*.py"))
FIRST = "mlp_regression"  # the README's first command: it has to fit on one screen
VMAP = {"per_example", "choose_a_threshold"}  # whose subject it is

every_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def names(path):
    """Gives every name and attribute that the code uses or imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name


def test_the_first_command_of_the_readme_is_there():
    assert FIRST in [path.stem for path in LESSONS]


@every_lesson
def test_a_lesson_is_short(path):
    assert len(path.read_text().splitlines()) <= (60 if path.stem == FIRST else 120)


@every_lesson
def test_a_lesson_begins_with_its_docstring(path):
    assert path.read_text().startswith('"""')
    assert len((ast.get_docstring(ast.parse(path.read_text())) or "").split()) > 20


@every_lesson
def test_a_lesson_can_be_copied_alone(path):
    ours = {other.stem for other in LESSONS} | {"benchmarks", "helpers", "tests", ""}
    assert not ours & {module.split(".")[0] for module in imported_modules(path)}


@every_lesson
def test_a_lesson_has_neither_options_nor_settings(path):
    banned = {"argparse", "dataclass", "dataclasses", "NamedTuple", "namedtuple"}
    assert not banned & {*imported_modules(path), *names(path)}


@every_lesson
def test_a_lesson_trains_one_run_at_a_time(path):
    assert ("vmap" in names(path)) <= (path.stem in VMAP)


@every_lesson
def test_a_lesson_draws_one_figure_of_its_name(path):
    saved = re.findall(r"savefig\((.*)", path.read_text())
    assert [text.split('"')[1] for text in saved] == [f"{path.stem}.png"]
