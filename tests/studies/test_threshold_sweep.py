"""The sweep finds the thresholds that converge."""

from types import SimpleNamespace

import numpy as np
import pytest

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def sweep(study):
    return study("threshold_sweep")


def test_some_thresholds_converge_and_none_without(sweep, run_study):
    result, printed, folder = run_study("threshold_sweep", "--quick")
    values = sweep.converged(result.by_name()["values within"])
    assert values[0] and not values[-1]
    assert np.isnan(result.pairs[:, -1, -1]).all()  # neither clip
    assert sweep.median_on_test(result.pairs).min() < 100

    path = folder / "threshold_sweep.png"
    assert path.stat().st_size > 10_000
    assert "both: best" in printed and f"\n  {path}\n" in printed


def test_every_threshold_is_trained_in_its_place(sweep, monkeypatch):
    def train(settings, seeds, epochs, data, on_epoch):
        """Ends with the thresholds instead of errors; the ones of leaves negative."""
        assert len(settings) == sweep.CHUNK
        ends = [
            -x.max_leaf_norm
            if np.isfinite(x.max_leaf_norm)
            else x.max_norm * 100 + x.max_value
            for x in settings
        ]
        errors = np.repeat(np.array(ends)[:, None, None], seeds, axis=1)
        return SimpleNamespace(train_mse=errors, test_mse=errors)

    monkeypatch.setattr(sweep, "train", train)
    result = sweep.sweep([2.0, 3.0], seeds=2, epochs=1)
    assert result.leaf_norms.shape == (2, 2, 2)
    assert result.leaf_norms[0, :, 0].tolist() == [-2.0, -3.0]
    pairs = [[202.0, 203.0, np.inf], [302.0, 303.0, np.inf], [np.inf] * 3]
    assert result.pairs[1, ..., 1].tolist() == pairs


def test_the_best_pair_is_the_smallest_median(sweep):
    pairs = np.full((2, 3, 3, 3), 50.0)
    pairs[:, 0, 1] = [[1.0, 2.0, 90.0], [4.0, 5.0, 900.0]]
    pairs[:, 1, 1] = [[1.0, np.nan, np.nan], [1.0, np.nan, np.nan]]
    pairs[:, 2, 2] = 1.0  # without a clip: not a pair
    result = sweep.Sweep(np.full((2, 2, 3), 50.0), pairs)
    place, text = sweep.best_pair([0.5, 7.0], result)
    assert place == (0, 1)
    assert text == "both: best 5 at global norm 0.5 and values within 7"
    expected = np.full((3, 3), True)
    expected[1, 1] = False
    np.testing.assert_array_equal(sweep.converged(result.pairs), expected)
