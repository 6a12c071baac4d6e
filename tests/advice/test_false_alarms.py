"""Healthy runs, noisy as they are, get no bad name."""

import pytest

from healthy import healthy_history
from optaxclip import diagnose
from optaxclip._advice.diagnose import BAD


def alarms(seeds):
    """Counts the histories that get a bad name."""
    return sum(not BAD.keys().isdisjoint(diagnose(healthy_history(x))) for x in seeds)


def test_of_100_healthy_histories_one_at_most_gets_a_bad_name():
    assert alarms(range(100)) <= 1


@pytest.mark.thorough
def test_of_1000_healthy_histories_one_percent_at_most_gets_a_bad_name():
    assert alarms(range(1000, 2000)) <= 10
