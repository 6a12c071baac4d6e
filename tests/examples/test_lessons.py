"""The examples are short lessons that run, and show what their docstrings say."""

import ast
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LESSONS = sorted((ROOT / "examples").glob("*.py"))
FIRST = "mlp_regression"  # the README's first command: it has to fit on one screen
VMAP = "per_example"  # the only one whose subject it is

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
    assert ("vmap" in names(path)) <= (path.stem == VMAP)


@every_lesson
def test_a_lesson_draws_one_figure_of_its_name(path):
    saved = re.findall(r"savefig\((.*)\)", path.read_text())
    assert saved == [f'"{path.stem}.png"']


@pytest.fixture
def run(tmp_path):
    """Runs a lesson as a user does, and gives the numbers of each printed line."""

    def run_lesson(name, *options):
        environment = {
            variable: value
            for variable, value in os.environ.items()
            if variable not in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS")
        }
        environment |= {"MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, ROOT / "examples" / f"{name}.py", *options]
        result = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        return [numbers(line) for line in result.stdout.splitlines()]

    return run_lesson


def numbers(line):
    found = re.findall(r"(?<![\w.])(?:nan|\d+(?:\.\d+)?(?:e[+-]\d+)?)", line)
    return [float(number) for number in found]


def test_mlp_regression_is_nan_without_a_clip_and_fits_with_one(run):
    without, *clipped = run("mlp_regression")
    assert len(without) == 2 and all(map(math.isnan, without))
    assert len(clipped) == 2
    assert max(max(errors[-2:]) for errors in clipped) < 100  # from 20 000


def test_fashion_mnist_guesses_without_a_clip_and_learns_with_one(run):
    (largest, guessed), (_, usual, accuracy) = run("fashion_mnist")
    assert largest > 1000 and usual < 10
    assert guessed < 25 and accuracy > 85


def test_nnx_training_survives_missing_values_by_its_clip(run):
    (without, never), (_, error, clipped) = run("nnx_training")
    assert without > 0.5 and never == 0
    assert error < 0.2 and 0 < clipped < 50


def test_bad_batches_are_skipped_by_the_guard_for_their_kind(run):
    without, with_one, with_both, nonfinite, large = run("bad_batches")
    assert math.isnan(without[0])
    assert with_one[0] > 1 and with_one[1] < 50
    assert with_both[0] < 0.6 and with_both[1] > 85
    found, skipped = nonfinite
    assert found == skipped > 0
    found, _, skipped = large
    assert 0 < skipped <= found


def test_mixed_precision_needs_a_scale_to_train_as_float32_does(run):
    exact, unscaled, scaled = run("mixed_precision", "--quick")
    assert exact[1] == unscaled[1] == 0 < scaled[1] < 20
    assert unscaled[0] > 1.3 * exact[0]
    assert scaled[0] == pytest.approx(exact[0], rel=0.2)
