"""The study of broken batches runs, and shows what its first lines say it shows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.thorough

DEAD = ("neither clip nor guard", "clip", "apply_if_finite(5)")
ALIVE = ("zero_nonfinite", "skip_if_nonfinite", "both guards")
STEPS = 200  # of the quick mode


@pytest.fixture(scope="module")
def survive(study):
    return study("survive_bad_batches")


@pytest.fixture(scope="module")
def quick(run_study):
    """Runs the quick mode once: the histories, the output, the folder of the figure."""
    return run_study("survive_bad_batches", "--quick")


def test_a_nan_kills_at_once_without_a_guard_and_in_a_burst_with_that_of_optax(
    survive, quick
):
    faults = survive.make_faults(STEPS)
    first_nan = np.flatnonzero(faults == survive.NAN)[0]
    burst = np.flatnonzero(faults == survive.ALL_NAN)
    for name, step in zip(DEAD, (first_nan, first_nan, burst[5]), strict=True):
        finite = np.isfinite(quick[0][name].test_loss)
        assert finite[:, :step].all()
        assert not finite[:, step:].any()
        assert not quick[0][name].accuracy.any()


@pytest.mark.parametrize("name", ALIVE)
def test_whoever_survives_has_learnt(quick, survive, name):
    history = quick[0][name]
    assert (survive.deaths(history) == STEPS).all()
    assert history.accuracy.min() > 0.85


def test_the_guard_skips_the_nonfinite_batches_and_those_alone(survive, quick):
    history, faults = quick[0]["skip_if_nonfinite"], survive.make_faults(STEPS)
    bad = (survive.NAN, survive.INF, survive.LABELS, survive.ALL_NAN)
    expected = np.broadcast_to(np.isin(faults, bad), history.skipped.shape)
    np.testing.assert_array_equal(history.skipped, expected)
    burst = np.flatnonzero(faults == survive.ALL_NAN)
    assert history.summary["guard/skipped_count"] == expected[0].sum()
    assert history.summary["guard/culprit/Dense_0/kernel"] == burst[-1]


def test_the_guard_against_spikes_skips_no_good_batch(survive, quick):
    history, faults = quick[0]["both guards"], survive.make_faults(STEPS)
    assert not history.skipped[:, faults == survive.GOOD].any()
    assert history.skipped[:, faults == survive.PIXELS].any()
    # Each guard counts what it objected to.
    skipped = [history.summary[f"guard_{i}/skipped_count"] for i in (0, 1)]
    assert sum(skipped) == history.skipped[0].sum()


def test_the_table_names_all_settings_and_whom_the_guards_blame(quick):
    _, printed, _ = quick
    names = (*DEAD, *ALIVE)
    lines = {
        name: line
        for line in printed.splitlines()
        for name in names
        if line.startswith(f"{name}  ")
    }
    assert set(lines) == set(names)
    assert "2/2" in lines["clip"]
    assert "NaN pixel" in lines["clip"]
    assert "burst" in lines["apply_if_finite(5)"]
    assert all("0/2" in lines[name] for name in ALIVE)
    assert "Dense_0/kernel" in lines["skip_if_nonfinite"]


def test_the_figure_is_written_and_named(quick):
    _, printed, folder = quick
    path = folder / "bad_batches.png"
    assert path.stat().st_size > 10_000
    assert f"\n  {path}\n" in printed


def test_labels_that_do_not_exist_leave_the_gradient_finite(survive):
    x, y = survive.spoil(survive.LABELS, jnp.full((8, 64), 0.5), jnp.arange(8))
    params = jax.tree.map(lambda leaf: leaf[0], survive.init_params(np.arange(1)))
    loss, grads = jax.jit(jax.value_and_grad(survive.mean_loss))(params, x, y)
    assert jnp.isnan(loss)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_too_few_steps_for_all_faults_are_refused(survive, capsys, tmp_path):
    with pytest.raises(SystemExit) as exit_info:
        survive.main(["--steps", "199", "--out", str(tmp_path)])
    assert exit_info.value.code == 2
    message = "argument --steps: expected at least 200, for all the faults"
    assert message in capsys.readouterr().err
