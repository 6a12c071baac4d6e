"""The examples run, and show what their first lines say they show."""

import contextlib
import importlib
import io
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def example():
    """Imports an example from its folder, as running it as a script does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
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
    assert np.max(list(final.values())) < 2000  # from 20000
    assert np.max(final["norm 1 per leaf"]) < 100
    assert np.max(final["values within 0.5"]) < 100
    assert all(name in printed for name in settings)
    assert "CPU seconds after imports" in printed


@pytest.mark.parametrize(
    "name", ["target", "learning_curves", "gradient_norms", "loss_to_nan"]
)
def test_mlp_regression_writes_its_figures(mlp_regression, name):
    *_, folder = mlp_regression
    assert (folder / f"{name}.png").stat().st_size > 10_000


def test_mlp_regression_records_the_norms_before_the_clip(mlp_regression):
    module, history, *_ = mlp_regression
    _, global_norm, leaf_norm, *_ = norms = history.norm[..., : module.BATCHES]
    # A seed gives the same first step in all settings, for nothing is clipped yet;
    # and the gradients stay hundreds of times larger than the thresholds.
    np.testing.assert_allclose(norms[:6, :, 0] - norms[0, :, 0], 0, atol=1e-2)
    assert (global_norm > 100).all() and (leaf_norm > 100).all()
    of_leaves = [norms[2] for norms in history.leaf_norms.values()]
    np.testing.assert_allclose(
        history.norm[2], np.linalg.norm(of_leaves, axis=0), rtol=1e-5
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

    assert "both: best" in capsys.readouterr().out
    assert (tmp_path / "threshold_sweep.png").stat().st_size > 10_000


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
