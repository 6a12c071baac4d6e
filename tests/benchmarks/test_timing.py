"""Figures compare what was timed in the same round, not medians of different ones."""

import pytest


@pytest.fixture
def timing(script):
    return script("_timing")


def test_ratios_are_taken_within_a_round(timing):
    # A slow moment of the machine hits all contenders of its round alike.
    times = {"base": [1.0, 10.0, 2.0], "other": [1.5, 15.0, 3.0]}
    assert timing.quartiles(times, "base")["other"] == (1.5, 1.5, 1.5)
    assert timing.summarize(times, "base")["other"] == (3.0, 1.5, 1.0)


def test_quartiles_come_smallest_first(timing):
    times = {"base": [1.0] * 5, "other": [5.0, 1.0, 4.0, 2.0, 3.0]}
    assert timing.quartiles(times, "base")["other"] == (2.0, 3.0, 4.0)


@pytest.mark.parametrize(("whole", "expected"), [(True, 3.0), (False, 103.0)])
def test_a_step_adds_what_it_takes_beyond_that_without_a_clip(script, whole, expected):
    found = script("whole_step").added((1.01, 1.03, 1.04), whole)
    assert found["added_percent"] == pytest.approx(expected)
    assert list(found) == ["added_percent", "low_percent", "high_percent"]
    assert found["low_percent"] < found["added_percent"] < found["high_percent"]
