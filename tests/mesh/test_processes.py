"""A mesh over two processes means the same to a clip as one device.

Two real processes of four virtual devices each talk by Gloo, as two machines would.
They run the clips of the table whose ways through the code differ, each in one setting
or in all. The whole table runs in all of them in `test_meshes.py`, in one process.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import two_processes

SCRIPT = Path(__file__).with_name("two_processes.py")
TIMEOUT = 240  # seconds; they need 40 on two cores
RTOL = 1e-6  # a few roundings of float32


def run(commands, folder, timeout):
    """Runs all commands at once; all are stopped when one fails or time is up.

    Raises:
      AssertionError: with what was written by those that failed, or by all.
    """
    paths = str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "XLA_FLAGS": "",  # devices are the script's business
    }
    logs = [folder / f"process_{number}.log" for number in range(len(commands))]
    with contextlib.ExitStack() as stack:
        processes = []
        for command, log in zip(commands, logs, strict=True):
            out = stack.enter_context(log.open("w"))
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=environment
            )
            stack.enter_context(process)  # waits for its end, ...
            stack.callback(process.kill)  # ... which comes at once, whatever happens
            processes.append(process)
        error, failed = wait(processes, timeout)
    wrote = "\n".join(logs[number].read_text() for number in failed)
    assert not error, f"{error} What was written:\n{wrote}"


def wait(processes, timeout):
    """Waits until all have ended, or one has failed: what went wrong, and where."""
    deadline = time.monotonic() + timeout
    while True:
        codes = [process.poll() for process in processes]
        if failed := [number for number, code in enumerate(codes) if code]:
            first = failed[0]  # the others would wait for it
            return f"Process {first} ended with exit code {codes[first]}.", failed
        if None not in codes:
            return "", []
        if time.monotonic() > deadline:
            error = f"Expected the processes to end within {timeout:g} s."
            return error, range(len(processes))
        time.sleep(0.1)


def free_address():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def copies(reports):
    """The hashes of all copies of every piece, wherever they are, by case and place."""
    found = {}
    for report in reports:
        for case, places in report["hashes"].items():
            for place, hashes in places.items():
                found.setdefault((case, place), []).extend(hashes)
    return found


@pytest.mark.thorough
def test_two_processes_clip_as_one_device(tmp_path):
    files = [tmp_path / f"{number}.json" for number in range(two_processes.PROCESSES)]
    script = [sys.executable, str(SCRIPT), free_address()]
    commands = [[*script, str(number), str(file)] for number, file in enumerate(files)]
    run(commands, tmp_path, TIMEOUT)
    reports = [json.loads(file.read_text()) for file in files]
    cases = {
        f"{name}, {setting}, {size:g}"
        for name, setting in two_processes.CASES
        for size in two_processes.SIZES
    }
    for report in reports:
        assert report["owners"] == [[0, 0], [0, 0], [1, 1], [1, 1]]
        assert {case.rpartition(", ")[0] for case in report["deviations"]} == cases
        deviations = report["deviations"].items()
        assert not [(case, off) for case, off in deviations if not off <= RTOL]
        history = report["history"].items()
        assert len(history) > 8 and max(off for _, off in history) <= RTOL
    found = copies(reports)
    assert {len(hashes) for hashes in found.values()} == {1, 4, 8}
    assert not [piece for piece, hashes in found.items() if len(set(hashes)) > 1]


def test_a_process_that_fails_stops_the_others_and_is_heard(tmp_path):
    waiting = "import time; print('waiting'); time.sleep(100)"
    failing = "raise SystemExit('no such device')"
    commands = [[sys.executable, "-c", line] for line in (waiting, failing)]
    with pytest.raises(AssertionError, match=r"Process 1 .* code 1(.|\n)*no such dev"):
        run(commands, tmp_path, 50)


def test_processes_that_take_too_long_are_stopped(tmp_path):
    commands = [[sys.executable, "-c", "import time; time.sleep(100)"]] * 2
    with pytest.raises(AssertionError, match=r"to end within 0\.1 s"):
        run(commands, tmp_path, 0.1)
