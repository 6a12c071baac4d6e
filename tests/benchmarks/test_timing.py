"""Figures compare what was timed in the same round, not medians of different ones."""

import time

import numpy as np
import pytest


@pytest.fixture
def timing(script):
    return script("_timing")


def test_ratios_are_taken_within_a_round(timing):
    # A slow moment of the machine hits all contenders of its round alike.
    times = {"base": [1.0, 10.0, 2.0], "other": [1.5, 15.0, 3.0]}
    assert timing.medians(times, "base")["other"] == [1.5, 1.5, 1.5]
    assert timing.summarize(times, "base")["other"] == (3.0, 1.5, 1.0)


def test_the_interval_of_a_few_rounds_is_all_that_was_seen(timing):
    times = {"base": [1.0] * 3, "other": [5.0, 1.0, 4.0]}
    assert timing.medians(times, "base")["other"] == [1.0, 4.0, 5.0]


@pytest.mark.parametrize("rounds", [20, 61, 301])
def test_the_median_is_in_its_interval_nineteen_times_of_twenty(timing, rounds):
    rng, base = np.random.default_rng(0), [1.0] * rounds
    draws = rng.lognormal(size=(2000, rounds))  # their median is 1
    found = [timing.medians({"base": base, "x": x}, "base")["x"] for x in draws]
    inside = [low <= 1 <= high for low, _, high in found]
    assert 0.93 < np.mean(inside) < 0.97


@pytest.mark.parametrize(("whole", "less"), [(True, 100.0), (False, 0.0)])
def test_a_step_adds_what_it_takes_beyond_that_without_a_clip(script, whole, less):
    found = script("whole_step").added((1.01, 1.03, 1.04), whole)
    assert found == pytest.approx([101.0 - less, 103.0 - less, 104.0 - less])


def test_each_clock_has_its_own_times_of_the_same_work(timing):
    hours = iter(range(100))
    contenders = {name: lambda calls: None for name in ("base", "other")}
    clocks = [time.perf_counter, lambda: float(next(hours))]
    by_clock, by_hour = timing.interleave_on(contenders, 3, clocks)
    assert {name: len(own) for name, own in by_clock.items()} == {"base": 3, "other": 3}
    calls = 1 / by_hour["base"][0]
    assert calls >= 1 and by_hour["other"] == [1 / calls] * 3


def test_all_take_turns_at_being_first(timing):
    order = []
    contenders = {name: lambda _, name=name: order.append(name) for name in "abc"}
    timing.interleave(contenders, 3)
    assert "".join(order[3:]) == "abcbcacab"
