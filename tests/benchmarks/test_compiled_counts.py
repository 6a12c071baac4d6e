"""A step starts, moves and needs what is said here, as compiled for an H200.

These are exact figures of one compiler, and a newer one may have others. The units are
those of `benchmarks/compiled.py`, where it is said what the least is that they can be.
"""

import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks import _results

pytestmark = pytest.mark.compilers

JAX = "0.12."
# Of ours, by tree, dtype and clip: kernels, traffic, temporary memory.
COUNTS = {
    ("lstm", "float32", "global_norm"): (9, 6.0, 0.01),
    ("lstm", "float32", "value"): (21, 6.0, 0.04),
    ("lstm", "float32", "leaf_norm"): (6, 6.01, 0.01),
    ("lstm", "float32", "group_norm"): (6, 6.01, 0.01),
    ("lstm", "float32", "block_rms"): (6, 6.01, 0.01),
    ("lstm", "float32", "adaptive"): (14, 7.23, 0.1),
    ("lstm", "float32", "unit_norm"): (11, 6.16, 0.07),
    ("lstm", "float32", "normalize"): (9, 6.0, 0.01),
    ("lstm", "float32", "zclip"): (14, 6.0, 0.01),
    ("lstm", "float32", "adagc"): (9, 6.01, 0.01),
    ("lstm", "float32", "autoclip"): (18, 9.49, 0.29),
    ("lstm", "float32", "u_clip"): (9, 9.0, 0.01),
    ("lstm", "float32", "skip_if_nonfinite"): (19, 7.2, 0.14),
    ("lstm", "float32", "record"): (19, 6.02, 0.02),
    ("lstm", "bfloat16", "global_norm"): (9, 6.0, 0.02),
    ("lstm", "bfloat16", "value"): (21, 6.01, 0.07),
    ("lstm", "bfloat16", "leaf_norm"): (6, 6.01, 0.02),
    ("lstm", "bfloat16", "group_norm"): (6, 6.01, 0.02),
    ("lstm", "bfloat16", "block_rms"): (6, 6.02, 0.02),
    ("lstm", "bfloat16", "adaptive"): (14, 7.47, 0.19),
    ("lstm", "bfloat16", "unit_norm"): (11, 6.32, 0.15),
    ("lstm", "bfloat16", "normalize"): (9, 6.0, 0.02),
    ("lstm", "bfloat16", "zclip"): (14, 6.01, 0.03),
    ("lstm", "bfloat16", "adagc"): (9, 6.02, 0.03),
    ("lstm", "bfloat16", "autoclip"): (18, 12.97, 0.57),
    ("lstm", "bfloat16", "u_clip"): (9, 12.01, 0.02),
    ("lstm", "bfloat16", "skip_if_nonfinite"): (19, 7.46, 0.28),
    ("lstm", "bfloat16", "record"): (19, 6.05, 0.04),
    ("lstm128", "float32", "global_norm"): (8, 6.0, 0.0),
    ("lstm128", "float32", "adaptive"): (11, 7.11, 0.03),
    ("lstm128", "float32", "value"): (23, 6.0, 0.01),
    ("mixed", "float32", "global_norm"): (26, 6.0, 0.0),
    ("mixed", "float32", "value"): (26, 6.0, 0.0),
    ("mixed", "float32", "leaf_norm"): (23, 6.0, 0.0),
    ("mixed", "float32", "group_norm"): (23, 6.0, 0.0),
    ("mixed", "float32", "block_rms"): (23, 6.0, 0.0),
    ("mixed", "float32", "adaptive"): (48, 7.01, 0.0),
    ("mixed", "float32", "unit_norm"): (37, 6.01, 0.0),
    ("mixed", "float32", "normalize"): (26, 6.0, 0.0),
    ("mixed", "float32", "zclip"): (30, 6.0, 0.0),
    ("mixed", "float32", "adagc"): (26, 6.0, 0.0),
    ("mixed", "float32", "autoclip"): (35, 6.03, 0.0),
    ("mixed", "float32", "u_clip"): (27, 9.0, 0.0),
    ("mixed", "float32", "skip_if_nonfinite"): (35, 6.01, 0.0),
    ("mixed", "float32", "record"): (35, 6.0, 0.0),
    ("mixed", "bfloat16", "adaptive"): (48, 7.08, 0.03),
    ("mixed", "bfloat16", "unit_norm"): (37, 6.04, 0.02),
}
# Of ours, by form and clip: all-reduces, of GPT-2 with one layer on 4 x 2 devices.
ALL_REDUCES = {
    ("jit", "adaptive"): 8,
    ("jit", "block_rms"): 3,
    ("jit", "global_norm"): 3,
    ("jit", "group_norm"): 3,
    ("jit", "leaf_norm"): 3,
    ("jit", "value"): 6,
    ("explicit", "adaptive"): 2,
    ("explicit", "block_rms"): 1,
    ("explicit", "global_norm"): 1,
    ("explicit", "group_norm"): 1,
    ("explicit", "leaf_norm"): 1,
    ("explicit", "value"): 1,
    ("over_axes", "adaptive"): 2,
    ("over_axes", "block_rms"): 1,
    ("over_axes", "global_norm"): 1,
    ("over_axes", "group_norm"): 1,
    ("over_axes", "leaf_norm"): 1,
    ("over_axes", "value"): 1,
    ("shard_map", "adaptive"): 2,
    ("shard_map", "block_rms"): 1,
    ("shard_map", "global_norm"): 1,
    ("shard_map", "group_norm"): 1,
    ("shard_map", "leaf_norm"): 1,
    ("shard_map", "value"): 1,
}

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
# Set for tests; a user compiles in full, and for one device.
OF_TESTS = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS")


def rows_of(name: str, folder: pathlib.Path, *options: str) -> list[_results.Row]:
    """Runs a benchmark in a process of its own, and returns the rows of ours."""
    environment = {k: v for k, v in os.environ.items() if k not in OF_TESTS}
    environment["PYTHONPATH"] = str(BENCHMARKS.parent)
    subprocess.run(
        [
            *(sys.executable, BENCHMARKS / f"{name}.py", "--platforms", "h200-8"),
            *("--out", folder, *options),
        ],
        env=environment,
        check=True,
    )
    rows = _results.load(folder / "nvidia-h200" / f"{name}.jsonl")
    return [row for row in rows if row["contender"] == "optaxclip"]


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    clips: dict[tuple[str, str], list[str]] = {}
    for tree, dtype, clip in COUNTS:
        clips.setdefault((tree, dtype), []).append(clip)
    found = {}
    for (tree, dtype), own in clips.items():
        options = ("--trees", tree, "--dtypes", dtype, "--clips", *own)
        rows = rows_of("compiled", tmp_path_factory.mktemp(tree), *options)
        found |= {(tree, dtype, row["clip"]): row for row in rows}
    return found


@pytest.mark.parametrize("step", COUNTS, ids="-".join)
def test_a_step_starts_and_moves_and_needs_what_is_said_here(steps, step):
    row = steps[step]
    assert row["jax"].startswith(JAX)
    figures = row["kernels"], round(row["traffic"], 2), round(row["temporary"], 2)
    assert figures == COUNTS[step]


@pytest.fixture(scope="module")
def sharded_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collectives")
    rows = rows_of("compiled_collectives", folder, "--quick")
    return {(row["form"], row["clip"]): row for row in rows}


def test_each_sharded_step_is_counted(sharded_steps):
    assert set(ALL_REDUCES) == set(sharded_steps)


@pytest.mark.parametrize("step", ALL_REDUCES, ids="-".join)
def test_a_sharded_step_has_so_many_all_reduces_and_no_gathers(sharded_steps, step):
    row = sharded_steps[step]
    assert (row["all_reduce"], row["breaks"]) == (ALL_REDUCES[step], [])
