"""The regression study shows what its first lines say it shows."""

import numpy as np
import pytest

pytestmark = pytest.mark.thorough

FIGURES = ("target", "learning_curves", "gradient_norms", "finite_but_dead")


@pytest.fixture(scope="module")
def regression(study, run_study):
    """Runs the quick mode once: module, history, finals by name, output, figures."""
    module = study("mlp_regression")
    history, printed, folder = run_study("mlp_regression", "--quick")
    names = list(module.textbook_settings(module.regression_data()))
    final = dict(zip(names, history.train_mse[..., -1], strict=True))
    return module, history, final, printed, folder


def test_it_is_nan_without_a_clip_and_converges_with_one(regression):
    _, _, final, printed, _ = regression
    assert np.isnan(final["no clip"]).all() and np.isnan(final["rate 0.0015"]).all()
    finite = {name: mse for name, mse in final.items() if np.isfinite(mse).all()}
    assert set(final) - set(finite) == {"no clip", "rate 0.0015"}
    del finite["global norm 600"]  # see below
    assert np.max(list(finite.values())) < 2000  # from 20000
    for name in "norm 1 per leaf", "values within 0.5", "rate 0.0015, norm 200":
        assert final[name].max() < 100, name
    assert final["relative step 0.03"].max() < 10
    assert all(f"\n{name}  " in printed for name in final)


def test_a_threshold_can_be_finite_and_dead(regression):
    module, history, final, printed, _ = regression
    data, dead = module.regression_data(), list(final).index("global norm 600")
    assert np.isfinite(history.batch_loss[dead]).all()
    of_the_mean, _ = module.mse_of_the_mean(data)
    assert of_the_mean == pytest.approx(data.y[: module.TRAIN_ROWS].var())
    np.testing.assert_allclose(final["global norm 600"], of_the_mean, rtol=0.01)
    shares = module.dead_share(history)
    assert shares[dead] > 0.9 and np.delete(shares, dead).max() == 0
    # Its norms look healed, while those of a good threshold are all above it.
    norm = history.norm[..., -module.BATCHES :]
    assert (norm[dead] < 600).all() and (history.norm[1] > 1.0).all()
    assert f"{shares[dead]:.0%}" in printed
    assert "The mean of the targets: MSE 20381 on train, 26269 on test" in printed


def test_one_clip_acts_on_large_gradients_alone(regression):
    module, history, final, *_ = regression
    settings = module.textbook_settings(module.regression_data())
    shares = module.clipped_share(settings, history)
    shares = dict(zip(settings, shares, strict=True))
    assert shares["no clip"] == shares["rate 0.0015"] == 0
    assert shares["global norm 1"] == shares["norm 1 per leaf"] == 1
    assert shares["values within 0.5"] == shares["relative step 0.03"] == 1
    norm, limit = history.norm[list(final).index("rate 0.0015, norm 200")], 200
    assert settings["rate 0.0015, norm 200"].max_norm == limit
    assert shares["rate 0.0015, norm 200"] == (norm > limit).mean()
    assert (norm[:, :20] > limit).all() and (norm[:, -module.BATCHES :] < limit).all()


def test_one_setting_bounds_the_step(regression):
    module, history, *_ = regression
    settings = list(module.textbook_settings(module.regression_data()).values())
    bounded = [np.isfinite(setting.relative_step) for setting in settings]
    assert np.isfinite(history.max_step).all(axis=(1, 2)).tolist() == bounded
    # What the bound sees is a step, in which the learning rate has its part.
    (i,) = np.flatnonzero(bounded)
    np.testing.assert_allclose(
        history.step_norm[i], settings[i].learning_rate * history.norm[i], rtol=1e-5
    )


def test_norms_are_recorded_before_the_clip(regression):
    module, history, final, *_ = regression
    # A seed gives the same first step in all settings, for nothing is clipped yet;
    # and the gradients stay hundreds of times larger than the thresholds.
    first = np.delete(history.norm[..., 0], list(final).index("standardised target"), 0)
    np.testing.assert_allclose(first - first[0], 0, atol=1e-2)
    assert (history.norm[[1, 3], :, : module.BATCHES] > 100).all()
    of_leaves = [norms[3] for norms in history.leaf_norms.values()]
    np.testing.assert_allclose(
        history.norm[3], np.linalg.norm(of_leaves, axis=0), rtol=1e-5
    )
    assert set(history.leaf_norms) == {
        f"Dense_{i}/{leaf}" for i in (0, 1) for leaf in ("bias", "kernel")
    }
    known = np.isfinite(history.norm)
    assert (history.largest[known] <= history.norm[known]).all()


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_written_and_named(regression, name):
    *_, printed, folder = regression
    path = folder / f"{name}.png"
    assert path.stat().st_size > 10_000
    assert f"\n  {path}\n" in printed
