"""Figures compare what was timed in the same round, not medians of different ones."""

import time

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
