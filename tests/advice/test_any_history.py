"""Whatever a history holds, there are sentences under known names."""

import time
import warnings

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from made_up import INF, NAN, flat, healthy
from optaxclip import diagnose
from optaxclip._advice.diagnose import NAMES

ODD = [0.0, NAN, INF, -INF, 1e308, -1e308, 5e-324, -1.0, 1.0, 65504.0]
COLUMNS = ["loss", "norm", "norm/a_0/kernel", "norm/a_1/kernel", "norm/a_1/bias"]
COLUMNS += ["clip/norm", "clip/max_norm", "clip/factor", "peak/norm", "peak/loss"]
COUNTS = ["run", "clipped", "skipped"]


def column(rng, rows):
    usual = np.exp(np.cumsum(rng.standard_normal(rows)) * rng.choice([0.1, 1.0]))
    odd = rng.random(rows) < rng.choice([0.0, 0.3, 1.0])
    odd |= np.arange(rows) >= rng.choice([rows // 2, rows])
    values = rng.choice(ODD, rows if rng.random() < 0.5 else 1)
    return np.where(odd, values, usual * rng.choice([-1.0, 1.0]))


def random_history(rng, rows):
    history = {
        "step": np.cumsum(rng.integers(0, 2 ** rng.integers(1, 50), rows)),
        "width": rng.integers(1, 2 ** rng.integers(1, 50), rows),
        "nonfinite": rng.integers(0, rng.integers(1, 3), rows),
    }
    for name in COLUMNS:
        if rng.random() < 0.5:
            history[name] = column(rng, rows)
    for name in COUNTS:
        if rng.random() < 0.3:
            history[name] = np.sort(rng.integers(0, 3, rows))
    return history


@hypothesis.given(seed=st.integers(0, 2**32 - 1), rows=st.integers(0, 40))
@hypothesis.settings(max_examples=300, deadline=None)
def test_any_history_has_sentences_under_known_names(seed, rows):
    rng = np.random.default_rng(seed)
    params = {f"a_{i}": {"kernel": np.ones((3, 4), np.float32)} for i in range(2)}
    verdicts = diagnose(random_history(rng, rows), params)
    assert verdicts and list(verdicts) == [x for x in NAMES if x in verdicts]
    assert all(text and text[0].isupper() for text in verdicts.values())


def test_no_rows_and_one_row_are_too_short():
    empty = {key: np.zeros(0, int) for key in ("step", "width", "nonfinite")}
    assert diagnose(empty) == {"too_short": "TOO SHORT: there are no rows."}
    text = "TOO SHORT: 1 finite row, and nothing stands out. 10 are needed to tell a"
    assert diagnose({"loss": [1.0]})["too_short"].startswith(text)


def test_what_is_missing_is_not_nan():
    history = healthy() | {
        "width": np.ones(200, int),
        "nonfinite": np.zeros(200, int),
    }
    history["norm"][::2] = NAN
    history["loss"][1::2] = NAN
    assert list(diagnose(history)) == ["healthy"]


@pytest.mark.parametrize("unit", [1e-30, 1e-6, 1e6, 1e30])
def test_units_say_nothing(unit):
    history = healthy()
    scaled = history | {"loss": unit * history["loss"], "norm": unit * history["norm"]}
    assert list(diagnose(scaled)) == ["healthy"]


def test_a_loss_below_zero_is_judged_by_its_course():
    history = healthy()
    assert list(diagnose(history | {"loss": history["loss"] - 3})) == ["healthy"]


def test_what_takes_rows_takes_anything_that_history_takes():
    rows = [{"loss": 2.0, "grad_norm": 1.0} for _ in range(20)]
    assert list(diagnose(rows)) == ["no_traction"]


# Several runs


def test_each_of_several_runs_is_judged_by_itself():
    runs = [healthy(60), healthy(60, seed=7), healthy(60, seed=9)]
    growth = 2 * np.geomspace(4, 4**8, 8)
    runs[1]["norm"][42:] = np.append(growth, np.full(10, NAN))
    runs[1]["loss"][42:] = np.append(growth, np.full(10, NAN))
    history = {key: np.concatenate([run[key] for run in runs]) for key in runs[0]}
    verdicts = diagnose(history | {"run": np.repeat([0, 1, 2], 60)})
    assert list(verdicts) == ["exploded"]  # and no word of health
    assert verdicts["exploded"].startswith("Run 2 of 3: EXPLODED at step 50")
    assert "\n" not in verdicts["exploded"]


def test_several_healthy_runs_have_a_line_each():
    runs = [healthy(60), healthy(60, seed=7)]
    history = {key: np.concatenate([run[key] for run in runs]) for key in runs[0]}
    verdicts = diagnose(history | {"run": np.repeat([0, 1], 60)})
    lines = verdicts["healthy"].splitlines()
    assert [line[:20] for line in lines] == [
        "Run 1 of 2: HEALTHY:",
        "Run 2 of 2: HEALTHY:",
    ]


def test_params_are_those_of_the_last_run():
    runs = [healthy(60), healthy(60, seed=7)]
    history = {key: np.concatenate([run[key] for run in runs]) for key in runs[0]}
    history["run"] = np.repeat([0, 1], 60)
    text = diagnose(history, {"w": np.array([NAN])})["not_finite"]
    assert text.startswith("Run 2 of 2: NOT FINITE WEIGHTS")


# A record: stretches, then the last steps one by one


def test_the_last_steps_of_a_record_are_no_change_of_pace():
    width = np.repeat([16, 1], [128, 128])
    history = healthy(256)
    time = (np.cumsum(width) - 1) / width.sum()
    history |= {"step": np.cumsum(width) - 1, "width": width}
    history |= {"nonfinite": np.zeros(256, int), "loss": 1 + 4 / (1 + 20 * time)}
    noise = flat(1.0, 256, 0.02)
    history |= {"loss": history["loss"] * noise, "peak/norm": 1.5 * history["norm"]}
    assert list(diagnose(history)) == ["healthy"]
    assert "HEALTHY: 2176 steps" in diagnose(history)["healthy"]


def test_a_hundred_thousand_rows_take_no_two_seconds():
    history = healthy(100_000)
    history["norm"][::7] = INF
    start = time.process_time()
    with warnings.catch_warnings(action="error"):
        assert list(diagnose(history)) == ["overflow_skips", "healthy"]
    assert time.process_time() - start < 2
