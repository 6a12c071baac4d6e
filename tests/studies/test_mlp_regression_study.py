"""Both studies run, and show what their first lines say they show."""

import contextlib
import importlib
import io
from pathlib import Path

import numpy as np
import pytest

STUDIES = Path(__file__).parents[2] / "benchmarks" / "studies"


@pytest.fixture(scope="module")
def example():
    """Imports a study from its folder, as running it as a script does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STUDIES))
        yield importlib.import_module


@pytest.fixture(scope="module")
def mlp_regression(example, tmp_path_factory):
    """Runs the quick mode once: the module, the history, the output, the figures."""
    module, out = example("mlp_regression"), tmp_path_factory.mktemp("figures")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        history = module.main(["--quick", "--out", str(out / "new" / "folder")])
    return module, history, printed.getvalue(), out / "new" / "folder"


def test_mlp_regression_is_nan_without_a_clip_and_converges_with_one(mlp_regression):
    module, history, printed, _ = mlp_regression
    settings = module.textbook_settings(module.regression_data(), 0.01)
    final = dict(zip(settings, history.train_mse[..., -1], strict=True))
    assert np.isnan(final.pop("no clip")).all()
    del final["global norm 600"]  # see below
    assert np.max(list(final.values())) < 2000  # from 20000
    assert np.max(final["norm 1 per leaf"]) < 100
    assert np.max(final["values within 0.5"]) < 100
    assert np.max(final["relative step 0.03"]) < 10
    assert all(name in printed for name in settings)
    assert "CPU seconds after imports" in printed


def test_mlp_regression_shows_a_threshold_that_is_finite_and_dead(mlp_regression):
    module, history, printed, _ = mlp_regression
    data = module.regression_data()
    dead = list(module.textbook_settings(data, 0.01)).index("global norm 600")
    assert np.isfinite(history.batch_loss[dead]).all()
    of_the_mean, _ = module.mse_of_the_mean(data)
    assert of_the_mean == pytest.approx(data.y[: module.TRAIN_ROWS].var())
    np.testing.assert_allclose(history.train_mse[dead, :, -1], of_the_mean, rtol=0.01)
    shares = module.dead_share(history)
    assert shares[dead] > 0.9 and np.delete(shares, dead).max() == 0
    # Its norms look healed, while those of a good threshold are all above it.
    norm = history.norm[..., -module.BATCHES :]
    assert (norm[dead] < module.TOO_HIGH).all() and (history.norm[1] > 1.0).all()
    assert f"{shares[dead]:.0%}" in printed
    assert "has an MSE of 20381 on train, 26269 on test" in printed


def test_mlp_regression_bounds_the_step_in_one_setting(mlp_regression):
    module, history, *_ = mlp_regression
    settings = list(module.textbook_settings(module.regression_data(), 0.01).values())
    bounded = [np.isfinite(setting.relative_step) for setting in settings]
    assert np.isfinite(history.max_step).all(axis=(1, 2)).tolist() == bounded
    # What the bound sees is a step, in which the learning rate has its part.
    (i,) = np.flatnonzero(bounded)
    np.testing.assert_allclose(
        history.step_norm[i], settings[i].learning_rate * history.norm[i], rtol=1e-5
    )
    assert (history.step_norm[i] > history.max_step[i]).all()


@pytest.mark.parametrize(
    "name", ["target", "learning_curves", "gradient_norms", "loss_to_nan"]
)
def test_mlp_regression_writes_its_figures_and_names_them(mlp_regression, name):
    *_, printed, folder = mlp_regression
    path = folder / f"{name}.png"
    assert path.stat().st_size > 10_000
    assert f"\n  {path}\n" in printed


def test_mlp_regression_records_the_norms_before_the_clip(mlp_regression):
    module, history, *_ = mlp_regression
    _, global_norm, _, leaf_norm, *_ = norms = history.norm[..., : module.BATCHES]
    # A seed gives the same first step in all settings, for nothing is clipped yet;
    # and the gradients stay hundreds of times larger than the thresholds.
    np.testing.assert_allclose(norms[:8, :, 0] - norms[0, :, 0], 0, atol=1e-2)
    assert (global_norm > 100).all() and (leaf_norm > 100).all()
    of_leaves = [norms[3] for norms in history.leaf_norms.values()]
    np.testing.assert_allclose(
        history.norm[3], np.linalg.norm(of_leaves, axis=0), rtol=1e-5
    )
    assert set(history.leaf_norms) == {
        f"Dense_{i}/{leaf}" for i in (0, 1) for leaf in ("bias", "kernel")
    }
    assert (history.largest[1:] <= history.norm[1:]).all()


def test_a_run_that_ended_in_nan_counts_as_the_worst(mlp_regression):
    module, *_ = mlp_regression
    runs = np.array([3.0, np.nan, 1.0, 2.0, np.inf])
    np.testing.assert_array_equal(module.quartiles(runs), [2.0, 3.0, np.nan])
    first = module.first_true(np.array([[False, True, True], [False, False, False]]))
    np.testing.assert_array_equal(first, [2.0, np.inf])


def test_threshold_sweep_finds_the_thresholds_that_converge(example, tmp_path, capsys):
    module = example("threshold_sweep")
    result = module.main(["--quick", "--out", str(tmp_path)])

    sweeps = result.by_name()
    assert [module.converged(errors).any() for errors in sweeps.values()] == [True] * 3
    assert module.converged(sweeps["values within"]).tolist()[:2] == [True, True]
    assert np.isnan(result.pairs[:, -1, -1]).all()  # neither clip
    assert np.nanmin(module.median_on_test(result.pairs)) < 50

    path = tmp_path / "threshold_sweep.png"
    assert path.stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "both: best" in printed and f"Figure: {path}\n" in printed


@pytest.mark.parametrize(
    "name",
    sorted(path.stem for path in STUDIES.glob("*.py") if "tqdm" in path.read_text()),
)
def test_no_bar_guesses_the_time_left_while_it_compiles(example, capsys, name):
    with example(name).progress_bar(total=1200, unit="steps", mininterval=0) as bar:
        bar.update(1)
    lines = capsys.readouterr().err.replace("\r", "\n").split()
    assert "compiling" in lines and "1/1200" in lines
    assert all("<" not in line and "/s" not in line for line in lines)


@pytest.mark.parametrize("name", ["mlp_regression", "threshold_sweep"])
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--seeds", "0", "expected a whole number >= 1, got '0'"),
        ("--seeds", "-3", "expected a whole number >= 1, got '-3'"),
        ("--epochs", "ten", "expected a whole number >= 1, got 'ten'"),
        ("--learning-rate", "0", "expected a number > 0, got '0'"),
        ("--learning-rate", "nan", "expected a number > 0, got 'nan'"),
        ("--learning-rate", "fast", "expected a number > 0, got 'fast'"),
        ("--out", __file__, "expected a folder to write to"),
    ],
)
def test_bad_options_say_what_was_expected(
    example, capsys, name, option, value, message
):
    with pytest.raises(SystemExit) as exit_info:
        example(name).main([f"{option}={value}"])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert f"argument {option}: {message}" in error
