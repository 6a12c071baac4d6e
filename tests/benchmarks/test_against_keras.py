"""Runs of both are compared as distributions, those of ours end the same in any way."""

import importlib.util

import numpy as np
import pytest


@pytest.fixture
def against(script):
    return script("against_keras")


def draw(seed, runs, clips, scale=1.0):
    return scale * np.random.default_rng(seed).lognormal(size=(clips, runs, 2))


def test_samples_of_one_distribution_are_equal_answers(against):
    clips = len(against.CLIPS)
    errors = {"optaxclip": draw(0, 24, clips), "keras": draw(1, 8, clips)}
    rows = against.compared(errors)
    assert len(rows) == 2 * clips
    assert min(row["probability"] for row in rows) > against.LEAST
    quartiles = np.percentile(errors["keras"][0, :, 1], [25, 50, 75])
    np.testing.assert_allclose(rows[1]["test_mse"], quartiles)


def test_samples_of_two_distributions_are_refused(against):
    clips = len(against.CLIPS)
    errors = {"optaxclip": draw(0, 24, clips), "keras": draw(1, 8, clips, scale=50.0)}
    with pytest.raises(AssertionError, match=r"With 'no clip' .* optaxclip and keras"):
        against.compared(errors)


def test_runs_that_end_in_nan_are_counted_and_left_out_of_the_quartiles(against):
    errors = np.ones((len(against.CLIPS), 4, 2))
    errors[0, :3] = np.nan
    errors[1] = np.inf
    some, none = against.compared({"optaxclip": errors})[:2]
    assert (some["not_finite"], some["train_mse"]) == (3, [1.0, 1.0, 1.0])
    assert none["not_finite"] == 4 and "train_mse" not in none


def test_nan_in_one_of_two_makes_them_unequal(against):
    lost, kept = np.full(12, np.nan), np.linspace(1.0, 2.0, 12)
    assert against.equally_distributed(lost, kept) < 1e-4
    assert against.equally_distributed(lost, lost) == 1.0


def test_without_keras_it_says_how_to_get_it(against, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert against.find_contenders() == ["optaxclip"]
    assert "pip install keras" in capsys.readouterr().out


def test_one_run_is_compared_with_keras_within_a_round(against, monkeypatch):
    totals = iter([1.0, 2.0, 10.0, 5.0, 3.0, 6.0])

    def start(way, *options):
        total = next(totals)
        return {"imports_s": 0.0, "train_s": [total], "total_s": total, "cpu_s": 1.0}

    monkeypatch.setattr(against, "start", start)
    ours, keras = against.one_run(["optaxclip", "keras"], 3, 1)
    assert (ours["total_s"], ours["total_ratio"]) == (3.0, 0.5)
    assert (keras["train_s"], keras["total_ratio"]) == (5.0, 1.0)


def test_keras_takes_its_median_run_times_all_runs(against, monkeypatch):
    seconds = {"together": [4.0], "keras": [1.0, 2.0, 90.0]}

    def start(way, *options):
        mse = np.ones((len(against.CLIPS), 3, 2)).tolist()
        return {"train_s": seconds[way], "train_cpu_s": seconds[way], "mse": mse}

    monkeypatch.setattr(against, "start", start)
    seeds = {"optaxclip": 24, "keras": 3}
    ours, keras = against.all_runs(["optaxclip", "keras"], seeds, 1)[:2]
    assert (ours["runs"], keras["runs"], keras["timed"]) == (120, 120, 15)
    assert (keras["train_s"], ours["train_s"]) == (240.0, 4.0)
    assert ours["total_ratio"] == ours["cpu_ratio"] == 4 / 240


@pytest.mark.thorough
def test_alone_and_together_a_seed_ends_the_same(against):
    options = ("--clips", *against.CLIPS[1:3], "--epochs", 3)
    alone, together = (against.start(way, *options) for way in ("alone", "together"))
    assert len(alone["train_s"]) == 2 and len(together["train_s"]) == 1
    assert 0 < alone["imports_s"] < alone["total_s"]
    np.testing.assert_allclose(alone["mse"], together["mse"], rtol=1e-3)
