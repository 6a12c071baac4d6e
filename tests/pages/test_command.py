"""`python -m optaxclip`: the verdict of any log, and its report."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers import oc
from optaxclip._pages.command import main

LOG = "step,loss,grad_norm\n" + "".join(
    f"{i},{2 - i / 20},{norm}\n"
    for i, norm in enumerate([*[1.5, 1.4] * 6, 3.0, 40.0, 900.0, 3e6, "NaN"])
)


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(LOG, encoding="utf-8")
    return path


def ran(*arguments):
    """Runs Python anew, as a user does."""
    root = str(Path(oc.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "COLUMNS": "60"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def test_it_prints_the_verdict_wrapped_to_the_terminal(log):
    done = ran("-m", "optaxclip", log)
    assert done.returncode == 0
    assert done.stderr == ""
    text = oc.diagnose(oc.history(log))["exploded"]
    paragraphs = [" ".join(x.split()) for x in done.stdout.split("\n\n")]
    assert paragraphs == [text, "For the pictures add --out report.html."]
    assert max(map(len, done.stdout.split("\n"))) <= 60


def test_the_import_loads_neither_matplotlib_nor_rich():
    code = "import sys, optaxclip; print({'matplotlib', 'rich'} & {*sys.modules})"
    assert ran("-c", code).stdout == "set()\n"


def test_it_writes_the_report_where_it_is_told(log, tmp_path, capsys):
    out = tmp_path / "out.html"
    assert main([str(log), "--out", str(out)]) == 0
    assert f"The report is in {out}." in capsys.readouterr().out
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_without_out_nothing_is_written(log, tmp_path):
    main([str(log)])
    assert list(tmp_path.iterdir()) == [log]


@pytest.mark.parametrize("content", ["", "no log at all", "epoch,accuracy\n1,0.5\n"])
def test_a_bad_log_gets_one_line_and_status_2(content, tmp_path, capsys):
    path = tmp_path / "bad.csv"
    path.write_text(content, encoding="utf-8")
    assert main([str(path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("optaxclip: Expected ")
    assert printed.err.count("\n") == 1


def test_a_log_that_is_not_there_gets_one_line_and_status_2(tmp_path, capsys):
    assert main([str(tmp_path / "missing.csv")]) == 2
    assert "missing.csv, where nothing is." in capsys.readouterr().err


def test_a_report_that_cannot_be_written_leaves_the_verdict(log, tmp_path, capsys):
    assert main([str(log), "--out", str(tmp_path / "no" / "out.html")]) == 1
    printed = capsys.readouterr()
    assert printed.out.startswith("EXPLODED at step 16")
    assert printed.err.count("\n") == 1


def test_without_matplotlib_the_verdict_is_there_and_the_extra_is_named(
    log, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([str(log)]) == 0
    assert main([str(log), "--out", str(tmp_path / "out.html")]) == 1
    printed = capsys.readouterr()
    assert printed.out.count("EXPLODED at step 16") == 2
    assert 'pip install "optaxclip[looking]"' in printed.err


def test_each_run_of_a_log_has_a_paragraph(tmp_path, capsys):
    path = tmp_path / "runs.npz"
    norms = np.tile([1.0, 1.0, 1.0, 30.0, 1e3, 1e6, np.nan], 2)
    steps, runs = np.tile(np.arange(7), 2), np.repeat([0, 1], 7)
    np.savez(path, step=steps, run=runs, norm=norms)
    assert main([str(path)]) == 0
    first, second, _ = capsys.readouterr().out.split("\n\n")
    assert first.startswith("Run 1 of 2: EXPLODED")
    assert second.startswith("Run 2 of 2: EXPLODED")
