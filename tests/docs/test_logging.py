"""The lines of `docs/logging.md` write what summary says: read with other eyes."""

import csv
import functools
import importlib
import inspect
import json
import pathlib
import re
import struct
import sys
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "logging.md"
SECTION = re.compile(r"^#+ (.*?)\n.*?^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
CODE = dict(SECTION.findall(PAGE.read_text(encoding="utf-8")))
LOOP = "Log what the clips did: CSV, TensorBoard, Weights & Biases"
STEPS = 20
BAD = 5  # the step whose batch has a NaN
CULPRIT = "guard/culprit/dense/bias"  # a name that is not there before it


def run(section, names):
    names = dict(names)
    exec(compile(CODE[section], PAGE.name, "exec"), names)
    return names


@functools.cache
def plain():
    """Returns the names that the page begins with."""
    return run(LOOP, {})


@functools.cache
def hard():
    """Returns them with infinite thresholds, and a step that is NaN and skipped."""
    names = run(LOOP, {})
    clips = optaxclip.clip_by_leaf_norm(jnp.inf), optaxclip.clip_by_global_norm(1.0)
    inner = optax.chain(*clips, optax.sgd(0.1))
    names["batches"][BAD, 0, -1] = np.nan
    names["optimizer"] = optaxclip.skip_if_nonfinite(inner)
    return names


both = pytest.mark.parametrize("make", [plain, hard])


@functools.cache
def expected(make):
    """Returns a row for each step, read at once from the state that it left."""
    names, rows = make(), []
    params = names["params"]
    opt_state = names["optimizer"].init(params)
    for batch in names["batches"]:
        params, opt_state, loss, _ = names["train_step"](params, opt_state, batch)
        row = {"loss": loss, **optaxclip.summary(opt_state, params)}
        rows.append({name: float(value) for name, value in row.items()})
    return rows


def assert_logged(rows, make, without=(), as_written: Callable[..., Any] = float):
    """Compares the rows that were read, by step, with what `summary` says."""
    right = [
        {key: as_written(x) for key, x in row.items() if key not in without}
        for row in expected(make)
    ]
    assert len(right[-1]) >= 6  # the loss and what a clip says
    np.testing.assert_equal(rows, dict(enumerate(right)))


def test_a_row_comes_when_four_later_steps_are_under_way(monkeypatch):
    names, begun = plain(), []
    step = names["train_step"]
    monkeypatch.setitem(
        names, "train_step", lambda *state: begun.append(0) or step(*state)
    )
    came = [len(begun) for _ in names["train"](names["params"], names["batches"])]
    assert came == [*range(5, STEPS + 1), *[STEPS] * 4]


@pytest.mark.parametrize("late", [0, 4, 50])
@pytest.mark.parametrize("every", [1, 3])
def test_rows_are_those_of_their_steps(every, late):
    names = hard()
    rows = dict(names["train"](names["params"], names["batches"], every, late))
    assert list(rows) == list(range(0, STEPS, every))
    np.testing.assert_equal(list(rows.values()), expected(hard)[::every])


def test_rows_outlive_the_states_that_are_donated(monkeypatch):
    names = hard()
    step = inspect.unwrap(names["train_step"])
    donating = jax.jit(step, donate_argnums=(0, 1))
    monkeypatch.setitem(names, "train_step", donating)
    params = jax.tree.map(jnp.copy, names["params"])
    rows = dict(names["train"](params, names["batches"]))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    np.testing.assert_equal(rows, dict(enumerate(expected(hard))))


@both
def test_a_scan_gives_the_same_rows(make):
    names = run("A loop inside of `scan`", make())
    rows = dict(names["train_by_scan"](names["params"], names["batches"]))
    right = expected(make)
    assert list(rows) == list(range(STEPS))
    for step, row in rows.items():
        assert row.keys() == right[step].keys() - {CULPRIT}
        for name in row:
            np.testing.assert_allclose(row[name], right[step][name], 1e-5, 0)


@both
def test_csv(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("CSV", make())
    with open("log.csv", newline="") as file:
        rows = {int(row.pop("step")): row for row in csv.DictReader(file)}
    assert_logged(rows, make, without=[CULPRIT], as_written=str)


@both
def test_json_lines(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("JSON lines", make())
    lines = map(json.loads, pathlib.Path("log.jsonl").read_text().splitlines())
    assert_logged({line.pop("step"): line for line in lines}, make)


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(folder, {"scalars": 0}).Reload()  # 0: as many as there are


@pytest.mark.thorough
@both
def test_tensorboard(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("TensorBoard", make())
    events = scalars("runs/first")
    rows = {step: {} for step in range(STEPS)}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            rows[event.step][name] = event.value
    assert_logged(rows, make, as_written=lambda x: float(np.float32(x)))


@pytest.mark.thorough
def test_tensorboard_keeps_few_signs_of_a_name(tmp_path):
    from tensorboardX import SummaryWriter

    shown = dict(re.findall("`(mlp[^`]*)` is shown as `(mlp[^`]*)`", PAGE.read_text()))
    with SummaryWriter(str(tmp_path)) as writer:
        for name in shown:
            writer.add_scalar(name, 1.0, 0)
    assert scalars(str(tmp_path)).Tags()["scalars"] == list(shown.values()) != []


def pieces(data):
    """Yields the records of a LevelDB log with seven bytes before it."""
    at, record = 7, b""
    while at + 7 <= len(data):
        rest = 32768 - at % 32768  # of this block
        if rest < 7:
            at += rest
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""


@pytest.mark.thorough
@both
def test_weights_and_biases(make, tmp_path, monkeypatch):
    for name in "CONFIG", "CACHE", "DATA":
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.chdir(tmp_path)
    run("Weights & Biases", make())
    import wandb

    wandb.teardown()  # or the next run goes to the folder of this one
    proto = importlib.import_module("wandb.proto.wandb_internal_pb2")
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    rows = {}
    for record in map(proto.Record.FromString, pieces(file.read_bytes())):
        items = {x.nested_key[0]: x.value_json for x in record.history.item}
        row = {name: json.loads(value) for name, value in items.items()}
        if row:
            rows[row["_step"]] = {k: x for k, x in row.items() if k[0] != "_"}
    assert_logged(rows, make)


@pytest.mark.thorough
@both
def test_trackio(make, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    for name in "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_BUCKET_ID":
        monkeypatch.delenv(name, raising=False)
    run("trackio", make())
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    *_, last = trackio.Api().runs("clips")
    lines = SQLiteStorage.get_logs("clips", run_id=last.id)
    assert all(line.pop("timestamp") for line in lines)
    rows = {line.pop("step"): line for line in lines}
    assert_logged(rows, make)


@pytest.mark.thorough
@both
def test_clu(make, monkeypatch, caplog):
    # The one file of clu's that needs TensorFlow, which the recipe does not use.
    file = "clu.metric_writers.summary_writer"
    monkeypatch.setitem(sys.modules, file, types.SimpleNamespace(SummaryWriter=None))
    with caplog.at_level("INFO", "absl"):
        run("clu", make())
    found = [re.fullmatch(r"\[(\d+)\] (.*)", text) for text in caplog.messages]
    rows = {
        int(line[1]): dict(pair.split("=") for pair in line[2].split(", "))
        for line in found
        if line
    }
    assert_logged(rows, make, as_written="{:.6g}".format)
