"""What the docs say of rules without a knob is what the stored rows say."""

import importlib
import pathlib

import numpy as np
import pytest

from benchmarks import _results

pytestmark = pytest.mark.thorough

STUDIES = pathlib.Path(__file__).parents[2] / "benchmarks" / "studies"
PAGE = STUDIES.parents[1] / "docs" / "which_rule.md"
JAX = "0.10."  # the version that those figures were made with
OURS = "by optimizer, 3 %"
# They go by more than the gradients: by the params, or by what comes out at last.
NOT_BY_GRADIENTS = ("by optimizer", "relative step", "step <=", "clip_by_global_norm")


@pytest.fixture(scope="module")
def no_knob():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STUDIES))
        yield importlib.import_module("no_knob")


@pytest.fixture(scope="module")
def rows():
    paths = _results.FOLDER.glob("*/no_knob.jsonl")
    found = [row for path in paths for row in _results.load(path)]
    return [row for row in found if row["jax"].startswith(JAX)]


@pytest.fixture(scope="module")
def verdicts(no_knob, rows):
    own = [row for row in rows if row["seeds"] == 16]
    names = dict.fromkeys(row["candidate"] for row in own)
    return {name: no_knob.judge(own, name) for name in names}


def test_the_rule_for_each_optimizer_is_near_in_56_of_72_cases(verdicts):
    ours = verdicts[OURS]
    assert ours.near.size == 72 and ours.near.sum() == 56
    assert f"{np.median(ours.ratios):.2f}" == "1.00"
    assert (ours.diverged, ours.runs) == (13, 1152)
    assert verdicts["none"].diverged == 323


def test_rules_that_go_by_the_gradients_alone_are_less_near(verdicts):
    others = [
        verdict
        for name, verdict in verdicts.items()
        if name != "none" and not any(word in name for word in NOT_BY_GRADIENTS)
    ]
    assert len(others) > 9
    assert max(verdict.near.sum() for verdict in others) == 31
    assert min(verdict.diverged for verdict in others) == 37


@pytest.mark.parametrize(
    ("task", "worst", "diverged"), [("tensor", "4.9", 13), ("zeros", "2.0", 0)]
)
def test_two_tasks_are_the_limits(no_knob, rows, task, worst, diverged):
    own = [row for row in rows if row["seeds"] == 16 and row["task"] == task]
    found = no_knob.judge(own, OURS)
    assert f"{found.ratios.max():.1f}" == worst and found.diverged == diverged


def test_on_other_tasks_the_ratio_is_below_one_and_a_third(no_knob, rows):
    own = [row for row in rows if row["seeds"] == 16]
    own = [row for row in own if row["task"] not in ("tensor", "zeros")]
    found = no_knob.judge(own, OURS)
    assert found.ratios.max() < 1.33 and found.diverged == 0


def test_longer_runs_end_as_near(no_knob, rows):
    found = no_knob.judge([row for row in rows if row["seeds"] < 16], OURS)
    assert found.near.size == 32 and found.near.sum() == 19
    assert f"{np.median(found.ratios):.2f} {found.ratios.max():.1f}" == "1.02 1.7"
    assert found.diverged == 0


def test_both_optimizers_have_their_tasks(no_knob):
    tasks = [task() for task in no_knob.TASKS.values()]
    counts = [sum(t.moments is m for t in tasks) for m in no_knob.OPTIMIZERS.values()]
    assert counts == [13, 5]


NAMES = {
    "clip_by_relative_step()": "relative step",
    "clip_by_global_norm(1.0)": "global norm 1",
    "autoclip()": "autoclip(10)",
    "no clip": "none",
}


@pytest.mark.parametrize("title", ["SGD with momentum", "Adam"])
def test_the_page_says_of_each_optimizer_what_the_rows_say(no_knob, rows, title):
    moments = no_knob.OPTIMIZERS[title]
    own = [row for row in rows if row["seeds"] == 16]
    own = [row for row in own if no_knob.TASKS[row["task"]]().moments is moments]
    _, _, text = PAGE.read_text(encoding="utf-8").partition(f"By {title}, ")
    table = text.split("\n\n")[1].splitlines()[2:]
    assert len(table) == (9 if title != "Adam" else 8)
    for line in table:
        name, near, median, *worst, lost = line.strip("| ").split(" | ")
        name = name.strip("`")
        name = NAMES.get(name, name.removesuffix("()"))
        found = no_knob.judge(own, name)
        assert near.split()[0] == f"{found.near.sum()}"
        assert median == f"{np.median(found.ratios):.2f}"
        assert worst in ([], [f"{found.ratios.max():.2g}"])
        assert lost == f"{found.diverged}"


def test_the_figure_of_the_page_is_drawn_of_the_rows(no_knob):
    figure = importlib.import_module("no_knob_figure")
    drawn = figure.plot(figure.load())
    for ax, cases in zip(drawn.axes, (52, 20), strict=True):
        dots = [line for line in ax.lines if line.get_marker() == "."]
        assert [len(line.get_xdata()) for line in dots] == [cases] * len(figure.RULES)
