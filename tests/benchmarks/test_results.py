"""A new row replaces the one it answers anew, and no other is lost."""

import json

import pytest

from benchmarks import _results

SETTINGS = ("tree", "contender")


def make_row(contender="ours", run_ms=1.0, **fields):
    return {
        "date": "2026-01-01 00:00",
        "device": "AMD EPYC",
        "platform": "cpu",
        "cpus": 2,
        "jax": "0.12.0.1",
        "optaxclip": "0.1.0",
        "question": "overhead",
        "tree": "lstm",
        "contender": contender,
        "run_ms": run_ms,
    } | fields


def store(folder, *rows):
    _results.store(rows, SETTINGS, folder)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "amd-epyc-2-cpus" / "overhead.jsonl"


def test_a_row_replaces_the_one_of_its_setting(tmp_path, path):
    store(tmp_path, make_row(run_ms=1.0), make_row("optax"))
    store(tmp_path, make_row(run_ms=2.0, date="2026-01-02 00:00"))
    expected = [make_row("optax"), make_row(run_ms=2.0, date="2026-01-02 00:00")]
    assert _results.load(path) == sorted(expected, key=lambda row: row["contender"])


@pytest.mark.parametrize(
    "patch", [{"jax": "0.12.3"}, {"optax": "0.3"}, {"python": "3.14.0"}, {"rounds": 5}]
)
def test_what_is_no_setting_does_not_make_another_row(tmp_path, path, patch):
    store(tmp_path, make_row())
    store(tmp_path, make_row(**patch))
    assert _results.load(path) == [make_row(**patch)]


@pytest.mark.parametrize(
    "other",
    [{"jax": "0.9.2"}, {"optaxclip": "0.0.9"}, {"tree": "gpt2"}],
    ids=lambda other: next(iter(other)),
)
def test_other_versions_and_settings_stay(tmp_path, path, other):
    store(tmp_path, make_row(**other))
    store(tmp_path, make_row())
    assert _results.load(path) == [make_row(**other), make_row()]


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ({"device": "NVIDIA H200", "platform": "gpu"}, "nvidia-h200/overhead.jsonl"),
        ({"cpus": 16}, "amd-epyc-16-cpus/overhead.jsonl"),
        ({"question": "guards"}, "amd-epyc-2-cpus/guards.jsonl"),
    ],
)
def test_each_device_and_question_has_a_file(tmp_path, path, other, name):
    store(tmp_path, make_row(), make_row(**other))
    store(tmp_path, make_row(run_ms=2.0))
    assert _results.load(path) == [make_row(run_ms=2.0)]
    assert _results.load(tmp_path / name) == [make_row(**other)]


def test_the_order_of_runs_does_not_change_the_file(tmp_path, path):
    rows = [make_row(jax=jax, tree=x) for jax in ("0.10.2", "0.9.0") for x in "ab"]
    store(tmp_path, *rows)
    text = path.read_text()
    for row in reversed(rows):
        store(tmp_path, row)
    assert path.read_text() == text
    store(tmp_path / "other", *reversed(rows))
    assert (tmp_path / "other" / path.relative_to(tmp_path)).read_text() == text
    assert [row["jax"] for row in _results.load(path)] == ["0.9.0"] * 2 + ["0.10.2"] * 2


def test_an_interrupted_write_leaves_the_file_as_it_was(tmp_path, path, monkeypatch):
    store(tmp_path, make_row(), make_row("optax"))
    text, written = path.read_text(), []

    def stop_at_the_second(row):
        written.append(row)
        if len(written) == 2:
            raise KeyboardInterrupt
        return "{}"

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(json, "dumps", stop_at_the_second)
        store(tmp_path, make_row(run_ms=2.0))
    assert path.read_text() == text
    store(tmp_path, make_row(run_ms=2.0))
    assert _results.load(path) == [make_row("optax"), make_row(run_ms=2.0)]


@pytest.mark.parametrize("lost", [*_results.COMMON, *SETTINGS])
def test_a_row_that_lacks_a_field_is_refused(tmp_path, path, lost):
    store(tmp_path, make_row())
    text, row = path.read_text(), make_row(run_ms=2.0)
    del row[lost]
    with pytest.raises(ValueError, match=f"this one has no value for {lost}: "):
        store(tmp_path, make_row(run_ms=3.0), row)
    assert path.read_text() == text


def test_a_stored_row_that_lacks_a_field_is_refused(tmp_path):
    store(tmp_path, make_row())
    with pytest.raises(ValueError, match=r"contender, clip; .* no value for clip: "):
        _results.store([make_row(clip="value")], (*SETTINGS, "clip"), tmp_path)


def test_nothing_is_kept_where_there_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_results, "FOLDER", tmp_path)
    _results.store([make_row()], SETTINGS, None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "out"), [([], "results"), (["--quick"], None), (["--out", "x"], "x")]
)
def test_quick_rows_are_kept_only_where_it_is_said(monkeypatch, options, out):
    monkeypatch.setattr("sys.argv", ["benchmark", *options])
    found = _results.parse(_results.make_parser("What?", "a part")).out
    assert (found and found.name) == out


def test_this_machine_is_told_in_full():
    row = _results.machine() | {"question": "any"}
    assert _results.key(row, ()) and _results.path_of(row, _results.FOLDER)


def test_the_files_that_are_there_are_sorted_and_in_their_places():
    paths = list(_results.FOLDER.glob("*/*.jsonl"))
    rows = {path: _results.load(path) for path in paths}
    assert paths and all(rows.values())
    strangers = [
        path
        for path, own in rows.items()
        if {_results.path_of(row, _results.FOLDER) for row in own} != {path}
        or [_results.key(row, ())[:2] for row in own]
        != sorted(_results.key(row, ())[:2] for row in own)
    ]
    assert not strangers
