"""The lessons on sequences, examples, rules and meshes show what they say they do."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]


def run(name: str, folder: Path, *options: str) -> str:
    """Runs a lesson as a user does, checks its figure, and returns what it prints."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if key != "XLA_FLAGS" and not key.startswith("JAX_")
    }
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, paths)])
    environment["MPLBACKEND"] = "Agg"
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py"), *options],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.iterdir()] == [f"{name}.png"]
    figure = (folder / f"{name}.png").read_bytes()
    assert figure.startswith(b"\x89PNG") and len(figure) > 10_000
    return done.stdout


def numbers(printed: str, label: str) -> list[float]:
    """Reads the numbers of the line that begins with a label."""
    line = re.search(rf"^{re.escape(label)}  +(.*)$", printed, re.MULTILINE)
    assert line, f"no line {label!r} in:\n{printed}"
    number = r"nan|inf|-?\d+(?:\.\d+)?(?:e[+-]\d+)?"
    return [float(found) for found in re.findall(number, line[1])]


def test_handwriting_is_lost_without_the_clip_by_norm_and_learned_with_it(tmp_path):
    printed = run("handwriting_lstm", tmp_path, "--quick")
    [unclipped] = numbers(printed, "no clip")
    [in_ranges] = numbers(printed, "Graves' ranges")
    [clipped] = numbers(printed, "Graves' ranges and norm 2")
    assert not unclipped < 50 and not in_ranges < 50  # NaN counts as lost
    assert clipped < 0  # untrained it is 2


def test_the_character_model_learns_at_a_rate_that_needs_the_clip(tmp_path):
    printed = run("char_lm", tmp_path, "--quick")
    unclipped, never = numbers(printed, "no clip")
    clipped, share = numbers(printed, "norm 0.25")
    assert clipped < 2.7 < 3.5 < unclipped
    assert never == 0 and 1 <= share <= 40  # percent


def test_clips_of_single_examples_keep_wrong_labels_from_being_learned(tmp_path):
    printed = run("per_example", tmp_path)
    best_of_mean, mean = numbers(printed, "mean")
    _, each_clipped = numbers(printed, "each clipped")
    assert mean < best_of_mean - 0.05  # it forgets
    assert each_clipped > max(0.88, mean + 0.08)
    right, wrong = numbers(printed, "median norms")
    assert wrong > 5 * right


def test_the_norm_is_that_of_the_whole_gradient_under_jit_and_in_shard_map(tmp_path):
    printed = run("sharded_training", tmp_path)
    [under_jit] = numbers(printed, "jit")
    in_shard_map, off = numbers(printed, "shard_map")
    local = np.array(numbers(printed, "local norms"))
    assert abs(in_shard_map - under_jit) < 2e-4  # printed to four places
    assert off < 1e-5
    assert local.shape == (4,) and (local < 0.8 * under_jit).all()
    # Their squares are those of the whole, but for the bias, which each has.
    assert under_jit < np.linalg.norm(local) < 1.5 * under_jit


def test_the_rule_of_ones_own_holds_bad_batches_down(tmp_path):
    printed = run("own_rule", tmp_path)
    [unclipped] = numbers(printed, "no clip")
    [fixed] = numbers(printed, "fixed 1.0")
    [ruled] = numbers(printed, "own rule")
    assert ruled < 0.02 and ruled < fixed < 0.1 and unclipped > 1


def test_penalties_do_not_prevent_what_the_clip_prevents(tmp_path):
    printed = run("penalties", tmp_path)
    assert np.isnan(numbers(printed, "no clip")).all()
    assert np.isnan(numbers(printed, "no clip, L1 penalty")).all()
    assert np.isnan(numbers(printed, "no clip, L2 penalty")).all()
    [clipped] = numbers(printed, "clip")
    assert clipped < 200  # that of a constant is 26 000
