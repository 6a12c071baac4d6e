"""What is said of suggested thresholds is what the stored rows say."""

import pathlib

import numpy as np
import pytest

from benchmarks import _results

pytestmark = pytest.mark.thorough

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "choose_a_threshold.md"


@pytest.fixture(scope="module")
def suggested(study):
    return study("suggested")


@pytest.fixture(scope="module")
def rows():
    paths = _results.FOLDER.glob("*/suggested.jsonl")
    found = [row for path in paths for row in _results.load(path)]
    return [row for row in found if row["jax"].startswith("0.12.")]


@pytest.fixture(scope="module")
def figures(suggested, rows):
    """Median, worst and lost runs of a candidate, on a part of the tasks."""

    def find(candidate, *parts, but=()):
        tasks = {task for part in parts for task in suggested.PARTS[part]} - {*but}
        own = [row for row in rows if row["task"] in tasks]
        found = suggested.judge(own, candidate)
        median, worst = np.median(found.ratios), found.ratios.max()
        return f"{median:.2f} {worst:.2g}", found.diverged, found.runs

    return find


def test_every_task_is_in_one_part(suggested, rows):
    parts = [task for tasks in suggested.PARTS.values() for task in tasks]
    assert len(parts) == len(set(parts)) == 24
    assert {row["task"] for row in rows} == set(parts)
    assert {row["seeds"] for row in rows} == {16}


NEW = "SGD, the other half", "SGD, fresh tasks"


def test_asked_again_it_is_near_on_tasks_that_were_not_chosen_on(figures):
    assert figures("asked again, 3%", *NEW) == ("1.04 2.8", 13, 768)
    assert figures("asked again, 3%", *NEW, but=["tensor"]) == ("1.04 2.1", 0, 704)
    rest = figures("asked again, 3%", *NEW, but=["tensor", "units"])
    assert rest == ("1.03 1.2", 0, 640)


def test_at_first_it_is_a_safe_start(figures):
    assert figures("suggested, 3%", *NEW) == ("1.06 1.9e+03", 10, 768)
    assert figures("suggested, 3%", *NEW, but=["tensor"])[1] == 0
    assert figures("suggested, 3%", *NEW, but=["far"])[0] == "1.05 4.9"


def test_other_thresholds_lose_more_runs(figures):
    assert figures("clip_by_global_norm", *NEW)[1] == 7
    assert figures("clip_by_global_norm", *NEW, but=["tensor"])[1] == 0
    lost = {name: figures(name, *NEW)[1] for name in ("none", "90th percentile")}
    assert lost == {"none": 279, "90th percentile": 239}
    assert figures("global norm 1", *NEW)[1] == 89
    assert figures("no threshold", *NEW) == ("1.01 4.9", 13, 768)


def test_on_the_tasks_to_choose_on_no_run_is_lost(figures):
    part = "SGD, chosen on"
    assert figures("suggested, 3%", part) == ("1.10 11", 0, 448)
    assert figures("asked again, 3%", part) == ("1.05 2", 0, 448)


def test_larger_shares_that_would_be_chosen_lose_runs_on_the_rest(
    suggested, rows, figures
):
    tasks = suggested.PARTS["SGD, chosen on"]
    own = [row for row in rows if row["task"] in tasks]
    assert suggested.choose(own, "suggested") == 0.1
    assert suggested.choose(own, "asked again") == 0.04
    rest = "SGD, the other half"
    assert figures("suggested, 10%", rest)[1] == 36
    assert figures("asked again, 4%", rest)[1] == 18


def test_for_adam_a_low_percentile_is_near(figures):
    assert figures("suggested, 10th percentile", "Adam") == ("1.01 1.5", 0, 320)
    assert figures("asked again, 10th percentile", "Adam") == ("1.01 1.4", 0, 320)
    assert figures("suggested, 50th percentile", "Adam") == ("1.02 2.9", 0, 320)
    assert figures("global norm 1", "Adam") == ("1.02 1.4", 1, 320)


BY_SGD = {
    "the best of 13": "clip_by_global_norm",
    "`suggest_max_norm`, asked again after a run": "asked again, 3%",
    "`suggest_max_norm` at first": "suggested, 3%",
    "1": "global norm 1",
    "90th percentile of the norms without a clip": "90th percentile",
    "no clip": "none",
}
BY_ADAM = {
    "1": "global norm 1",
    "10th percentile of the norms without a clip": "suggested, 10th percentile",
    "the same, of a run with that clip": "asked again, 10th percentile",
    "median of the norms without a clip": "suggested, 50th percentile",
    "90th percentile": "90th percentile",
    "no clip": "none",
}


@pytest.mark.parametrize(
    ("start", "names", "parts"),
    [("By SGD with momentum, ", BY_SGD, NEW), ("By Adam, ", BY_ADAM, ["Adam"])],
)
def test_the_page_says_what_the_rows_say(figures, start, names, parts):
    _, _, text = PAGE.read_text(encoding="utf-8").partition(start)
    table = text.split("\n\n")[1].splitlines()[2:]
    assert len(table) == len(names)
    for line in table:
        name, median, worst, lost = line.strip("| ").split(" | ")
        ratios, diverged, _ = figures(names[name], *parts)
        found_median, found_worst = map(float, ratios.split())
        assert float(median) == found_median
        assert worst == "lost" if found_worst > 1e99 else float(worst) == found_worst
        assert lost == f"{diverged}"
