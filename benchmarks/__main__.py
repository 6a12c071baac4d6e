"""What do all benchmarks say on this machine?

Run, in the folder above:

    python -m benchmarks                    # all that fits the machine, an hour or two
    python -m benchmarks overhead           # some of them
    python -m benchmarks --device gpu       # on a GPU: tests of the numbers, then three
    python -m benchmarks --tables           # no run: the tables anew, of what is kept

Each runs as a script in a process of its own and keeps its rows; then the tables of
`README.md` and of `docs/` are made anew. Those that need a package or a compiler which
isn't there say how to get it, and run the rest. One that fails doesn't stop the next.

On a GPU the tests of the numbers come first, for a norm is computed in another way
there, and where they fail, nothing is timed. All of it has ten minutes.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks import _site, _tables

FOLDER = pathlib.Path(__file__).parent
SCRIPTS = sorted(path.stem for path in FOLDER.glob("[a-z]*.py"))
GPU_MINUTES = 10.0
NUMBERS = (
    "tests/measure/test_norms.py",
    "tests/contract/test_numerics.py",
    "tests/contract/test_single_numbers.py",
)
GPU_OPTIONS: dict[str, Sequence[str]] = {  # most of the time is compiling
    "whole_step": ("--optimizers", "momentum"),
    "overhead": (
        *("--compiles", "1", "--trees", "lstm", "gpt2"),
        *("--clips", "global_norm", "leaf_norm", "adaptive"),
    ),
    "compile_time": ("--compiles", "1", "--leaves", "10", "100", "300"),
}
FIND_GPU = "import jax; print(jax.devices('gpu'))"


class Command(NamedTuple):
    """What runs in a process of its own, by a name."""

    name: str
    words: Sequence[str]


def script(name: str, options: Sequence[str]) -> Command:
    return Command(name, (str(FOLDER / f"{name}.py"), *options))


def commands(args: argparse.Namespace) -> list[Command]:
    """Returns what runs, in order."""
    quick = ["--quick"] * args.quick
    if args.device == "cpu":
        return [script(name, quick) for name in args.scripts or SCRIPTS]
    return [
        script(name, [*options, *quick])
        for name, options in GPU_OPTIONS.items()
        if name in (args.scripts or SCRIPTS)
    ]


def environment(device: str) -> dict[str, str]:
    """Returns the variables by which a benchmark finds its device and our package."""
    paths = [str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]
    found = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if device == "cpu":
        return os.environ | found | {"JAX_PLATFORMS": "cpu"}
    return os.environ | found | {"OPTAXCLIP_DEVICES": "1"}


def run(command: Command, device: str, end: float) -> str:
    """Runs a command until a time; returns what went wrong, or nothing."""
    print(f"\n=== {command.name}", flush=True)
    left = end - time.monotonic()
    if left <= 0:
        return "no time was left"
    try:
        status = subprocess.run(
            [sys.executable, *command.words],
            cwd=FOLDER.parent,
            env=environment(device),
            timeout=None if left == float("inf") else left,
        ).returncode
    except subprocess.TimeoutExpired:
        return "its time was up; what it had kept stays"
    return f"exit status {status}" if status else ""


def run_all(args: argparse.Namespace) -> dict[str, str]:
    """Runs what was asked for; returns what went wrong, by name."""
    start = time.monotonic()
    end = start + 60 * (GPU_MINUTES if args.device == "gpu" else float("inf"))
    if args.device == "gpu":
        tests = Command("tests of the numbers", ("-m", "pytest", "-q", *NUMBERS))
        for first in Command("a GPU", ("-c", FIND_GPU)), tests:
            if wrong := run(first, args.device, end):
                return {first.name: f"{wrong}; nothing was timed"}
    wrongs = {}
    for command in commands(args):
        if wrong := run(command, args.device, end):
            wrongs[command.name] = wrong
    return wrongs


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scripts", nargs="*", help=f"of {', '.join(SCRIPTS)}")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--tables", action="store_true", help="runs nothing")
    parser.add_argument("--quick", action="store_true", help="does it run?")
    args = parser.parse_args(arguments)
    if strangers := set(args.scripts) - set(SCRIPTS):
        parser.error(f"expected some of {SCRIPTS}, got {sorted(strangers)}")
    wrongs = {} if args.tables else run_all(args)
    _tables.PAGE.write_text(_tables.rewrite(_tables.PAGE.read_text()))
    for page, text in _site.rewrite().items():
        page.write_text(text)
    for name, wrong in wrongs.items():
        print(f"FAILED: {name}: {wrong}")
    return len(wrongs) > 0


if __name__ == "__main__":
    sys.exit(main())
