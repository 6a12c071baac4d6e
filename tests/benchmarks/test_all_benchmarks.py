"""`python -m benchmarks` runs what fits, one after the other, whatever fails."""

import argparse
import importlib
import subprocess
import types

import pytest


@pytest.fixture
def benchmarks():
    return importlib.import_module("benchmarks.__main__")


@pytest.fixture
def ran(benchmarks, monkeypatch):
    """Lists the commands that would run; those with `broken` in them fail."""
    ran = []

    def run(command, *, timeout, **_):
        ran.append(" ".join(command[1:]))
        if "late" in ran[-1]:
            raise subprocess.TimeoutExpired(command, timeout)
        return types.SimpleNamespace(returncode=int("broken" in ran[-1]))

    monkeypatch.setattr(benchmarks.subprocess, "run", run)
    return ran


def arguments(*scripts, device="cpu", quick=False):
    return argparse.Namespace(scripts=list(scripts), device=device, quick=quick)


def test_every_benchmark_runs_on_a_cpu(benchmarks, ran):
    assert not benchmarks.run_all(arguments(quick=True))
    assert len(ran) == len(benchmarks.SCRIPTS) > 8
    assert all(command.endswith(".py --quick") for command in ran)


def test_one_that_fails_does_not_stop_the_next(benchmarks, ran):
    wrongs = benchmarks.run_all(arguments("broken", "late", "overhead"))
    assert len(ran) == 3
    assert wrongs == {
        "broken": "exit status 1",
        "late": "its time was up; what it had kept stays",
    }


def test_on_a_gpu_the_numbers_are_tested_first(benchmarks, ran):
    assert not benchmarks.run_all(arguments(device="gpu"))
    assert ran[0].startswith("-c") and "pytest" in ran[1]
    assert all(
        (benchmarks.FOLDER.parent / path).exists() for path in ran[1].split()[3:]
    )
    scripts = [command.split()[0].rpartition("/")[2][:-3] for command in ran[2:]]
    assert scripts == list(benchmarks.GPU_OPTIONS)
    assert set(scripts) <= set(benchmarks.SCRIPTS)


def test_nothing_is_timed_where_numbers_are_wrong(benchmarks, ran, monkeypatch):
    monkeypatch.setattr(benchmarks, "NUMBERS", ("tests/broken.py",))
    wrongs = benchmarks.run_all(arguments(device="gpu"))
    assert wrongs == {"tests of the numbers": "exit status 1; nothing was timed"}
    assert len(ran) == 2


def test_without_a_gpu_nothing_runs_on_one(benchmarks, ran, monkeypatch):
    monkeypatch.setattr(benchmarks, "FIND_GPU", "broken")
    wrongs = benchmarks.run_all(arguments(device="gpu"))
    assert list(wrongs) == ["a GPU"] and len(ran) == 1


def test_after_the_time_is_up_nothing_starts(benchmarks, ran, monkeypatch):
    monkeypatch.setattr(benchmarks, "GPU_MINUTES", 0.0)
    wrongs = benchmarks.run_all(arguments(device="gpu"))
    assert wrongs == {"a GPU": "no time was left; nothing was timed"} and not ran


def test_a_benchmark_that_is_not_there_is_refused(benchmarks, capsys):
    with pytest.raises(SystemExit):
        benchmarks.main(["overhaed"])
    assert "got ['overhaed']" in capsys.readouterr().err


def test_its_exit_status_says_whether_all_went_well(benchmarks, ran, monkeypatch):
    monkeypatch.setattr(benchmarks, "SCRIPTS", ["broken", "overhead"])
    page = types.SimpleNamespace(read_text=str, write_text=lambda text: None)
    monkeypatch.setattr(benchmarks._tables, "PAGE", page)
    monkeypatch.setattr(benchmarks._tables, "rewrite", lambda text: text)
    monkeypatch.setattr(benchmarks._site, "PAGES", {})
    assert benchmarks.main(["overhead"]) == 0
    assert benchmarks.main([]) == 1
    assert benchmarks.main(["--tables"]) == 0 and len(ran) == 3
