"""The lessons run as a user runs them, and show what their docstrings say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

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


def test_mlp_regression_is_nan_without_a_clip_and_fits_with_one(tmp_path):
    printed = run("mlp_regression", tmp_path)
    assert np.isnan(numbers(printed, "no clip")).all()
    for clip in "clipnorm 1", "clipvalue 5":
        assert max(numbers(printed, clip)) < 100  # from 20 000


@pytest.mark.thorough
def test_fashion_mnist_guesses_without_a_clip_and_learns_with_one(tmp_path):
    printed = run("fashion_mnist", tmp_path)
    largest, guessed = numbers(printed, "no clip")
    usual, accuracy = numbers(printed, "global norm 0.1")
    assert largest > 1000 and usual < 10
    assert guessed < 25 and accuracy > 85


@pytest.mark.thorough
def test_nnx_training_survives_missing_values_by_its_clip(tmp_path):
    printed = run("nnx_training", tmp_path)
    without, never = numbers(printed, "no clip")
    error, clipped = numbers(printed, "global norm 1.0")
    assert without > 0.5 and never == 0
    assert error < 0.2 and 0 < clipped < 50


@pytest.mark.thorough
def test_bad_batches_are_skipped_by_the_guard_for_their_kind(tmp_path):
    printed = run("bad_batches", tmp_path)
    assert np.isnan(numbers(printed, "no guard")[0])
    loss, accuracy = numbers(printed, "skip_if_nonfinite")
    assert loss > 1 and accuracy < 50
    loss, accuracy = numbers(printed, "and skip_if_spike")
    assert loss < 0.6 and accuracy > 85
    found = re.search(r"Of (\d+) batches with a NaN (\d+) were", printed)
    assert found and found[1] == found[2] != "0"
    found = re.search(r"Of (\d+) batches times 1000 (\d+) were", printed)
    assert found and 0 < int(found[2]) <= int(found[1])


@pytest.mark.thorough
def test_mixed_precision_needs_a_scale_to_train_as_float32_does(tmp_path):
    printed = run("mixed_precision", tmp_path, "--quick")
    exact, *skipped = numbers(printed, "float32")
    assert skipped == [0]
    unscaled, *skipped = numbers(printed, "float16")
    assert skipped == [0] and unscaled > 1.3 * exact
    scaled, skipped = numbers(printed, "float16 and a scale")
    assert 0 < skipped < 20 and abs(scaled / exact - 1) < 0.2


@pytest.mark.thorough
def test_handwriting_is_lost_without_the_clip_by_norm_and_learned_with_it(tmp_path):
    printed = run("handwriting_lstm", tmp_path, "--quick")
    [unclipped] = numbers(printed, "no clip")
    [in_ranges] = numbers(printed, "Graves' ranges")
    [clipped] = numbers(printed, "Graves' ranges and norm 2")
    assert not unclipped < 50 and not in_ranges < 50  # NaN counts as lost
    assert clipped < 0  # untrained it is 2


@pytest.mark.thorough
def test_the_character_model_learns_at_a_rate_that_needs_the_clip(tmp_path):
    printed = run("char_lm", tmp_path, "--quick")
    unclipped, never = numbers(printed, "no clip")
    clipped, share = numbers(printed, "norm 0.25")
    assert clipped < 2.7 < 3.5 < unclipped
    assert never == 0 and 1 <= share <= 40  # percent


@pytest.mark.thorough
def test_clips_of_single_examples_keep_wrong_labels_from_being_learned(tmp_path):
    printed = run("per_example", tmp_path)
    best_of_mean, mean = numbers(printed, "mean")
    _, each_clipped = numbers(printed, "each clipped")
    assert mean < best_of_mean - 0.05  # it forgets
    assert each_clipped > max(0.88, mean + 0.08)
    right, wrong = numbers(printed, "median norms")
    assert wrong > 5 * right


@pytest.mark.thorough
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


@pytest.mark.thorough
def test_the_rule_of_ones_own_holds_bad_batches_down(tmp_path):
    printed = run("own_rule", tmp_path)
    [unclipped] = numbers(printed, "no clip")
    [fixed] = numbers(printed, "fixed 1.0")
    [ruled] = numbers(printed, "own rule")
    assert ruled < 0.02 and ruled < fixed < 0.1 and unclipped > 1


@pytest.mark.thorough
def test_penalties_do_not_prevent_what_the_clip_prevents(tmp_path):
    printed = run("penalties", tmp_path)
    assert np.isnan(numbers(printed, "no clip")).all()
    assert np.isnan(numbers(printed, "no clip, L1 penalty")).all()
    assert np.isnan(numbers(printed, "no clip, L2 penalty")).all()
    [clipped] = numbers(printed, "clip")
    assert clipped < 200  # that of a constant is 26 000


@pytest.mark.thorough
def test_find_the_explosion_says_what_it_was_and_the_number_that_mends_it(tmp_path):
    printed = run("find_the_explosion", tmp_path)
    lost, mended = (
        float(x) for x in re.findall("^held-out error (.*)$", printed, re.M)
    )
    assert np.isnan(lost) and mended < 26  # a thousandth of that of a constant
    verdicts = re.findall("^([a-z_]+): [A-Z ]+", printed, re.MULTILINE)
    assert verdicts == ["exploded", "always_clipped", "healthy"]


@pytest.mark.thorough
def test_choose_a_threshold_begins_at_percentiles_and_ends_below_them(tmp_path):
    printed = run("choose_a_threshold", tmp_path)
    assert printed.startswith("healthy")
    found = dict(re.findall(r"^([a-z\d %]+), .*  +([\d.]+)$", printed, re.MULTILINE))
    names = "the best of 13", "half of them", "90 % of the norms", "no clip"
    errors = [float(found[name]) for name in names]
    assert errors == sorted(errors) and errors[0] < errors[-1] / 2
