"""The study of remedies runs, and shows what its first lines say it shows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.thorough

EXPLODE = {
    "none",
    "rate 0.003",
    "batches of 8",
    "batches of 125",
    "3 hidden layers",
    "first weights / 2",
    "first weights / 10",
    "L1 penalty",
    "L2 penalty",
    "no momentum",
}


@pytest.fixture(scope="module")
def remedies(study):
    return study("remedies")


@pytest.fixture(scope="module")
def quick(run_study):
    """Runs the quick mode once: the result, the output, the folder of the figures."""
    return run_study("remedies", "--quick")


@pytest.fixture(scope="module")
def pens(quick, remedies):
    """Losses on pens by cell and setting."""
    names = remedies.pen_settings()
    return {
        cell: dict(zip(names, zip(found.lost, found.nats, strict=True), strict=True))
        for cell, found in quick[0].pens.items()
    }


def test_a_factor_per_layer_and_per_step_is_multiplied(quick):
    layers, times = quick[0].layers, quick[0].times
    shares = {gain: norms[:, -1] / norms[:, 0] for gain, norms in layers.items()}
    # One layer more is a factor of the gain, and of what He's initialisation leaves.
    for gain, share in shares.items():
        np.testing.assert_allclose(share / shares[1.0], gain**49, rtol=1e-3)
    assert (shares[1.0] > 0.03).all() and (shares[1.0] < 30).all()
    shares = {which: norms[:, -1] / norms[:, 0] for which, norms in times.items()}
    assert (shares["plain", 2.0] > 1e4).all()
    assert (shares["plain", 1.0] < 1).all() and (shares["LSTM", 2.0] < 1).all()


def test_what_explodes_alone_is_finite_with_a_clip(quick, remedies):
    alone, clipped = quick[0].alone, quick[0].clipped
    lost = {name for name, ends in alone.items() if not np.isfinite(ends.mse).all()}
    assert lost == EXPLODE
    assert not any(np.isfinite(alone[name].mse).any() for name in lost)
    assert not any(remedies.lost(ends).any() for ends in clipped.values())
    assert clipped["none"].mse.max() < 500  # from 26000; more epochs, less


def test_a_clip_that_always_acts_is_a_part_of_the_rate(quick):
    clipped = quick[0].clipped
    for name in "rate 0.003", "rate 0.001", "rate 0.0003":
        np.testing.assert_allclose(clipped[name].mse, clipped["none"].mse, rtol=0.05)


def test_a_clip_that_is_not_needed_costs(quick):
    alone, clipped = quick[0].alone, quick[0].clipped
    for name in "no hidden layer", "Huber loss", "absolute error":
        assert clipped[name].mse.min() > 3 * alone[name].mse.max(), name


def test_after_momentum_a_threshold_means_ten_times_less(quick):
    clips = quick[0].clips
    few, same = (clips[f"norm {x} after momentum"].mse for x in (2, 20))
    assert few.min() > 10 * clips["norm 2"].mse.max() > 10 * same.max()


def test_truncation_and_ranges_do_not_save_a_rate_that_is_too_large(pens):
    for cell in "plain", "LSTM":
        for name in "rate 0.01", "rate 0.01, truncated to 10":
            assert pens[cell][name][0].all(), (cell, name)
        assert pens[cell]["rate 0.01, Graves' ranges"][0].all()
        for name in "rate 0.01, norm 2", "rate 0.01, values within 0.1":
            assert not pens[cell][name][0].any(), (cell, name)


def test_an_lstm_bears_more_than_a_plain_network(pens):
    assert pens["plain"]["rate 0.001"][0].all()
    assert not pens["LSTM"]["rate 0.001"][0].any()


def test_no_way_back_is_longer_than_the_truncation(study):
    recurrent = study("_remedies_recurrent")
    cell, moves = recurrent.plain_cell, recurrent.draw_pens(np.random.default_rng(0), 2)
    params = recurrent.init(cell, jax.random.key(0))

    def grads(truncation):
        numbers = recurrent.Numbers(truncation=truncation)
        grad = jax.grad(recurrent.nats, argnums=2)
        return jax.jit(grad, static_argnums=(0, 1))(cell, numbers, params, moves)

    never, longest = grads(np.inf), grads(recurrent.MOVES)
    jax.tree.map(np.testing.assert_array_equal, never, longest)
    cut = grads(10)
    assert jnp.abs(cut["cell"]["w"] - never["cell"]["w"]).max() > 1e-2
    np.testing.assert_allclose(cut["head"]["w"], never["head"]["w"], rtol=1e-4)


def test_tables_and_figures_are_written_and_named(quick, remedies):
    _, printed, folder = quick
    for names in remedies.REMEDIES, remedies.CLIPS, remedies.pen_settings():
        assert all(f"\n{name}  " in printed for name in names)
    for name in "factors", "explosion", "remedies":
        path = folder / f"{name}.png"
        assert 10_000 < path.stat().st_size < 120_000
        assert f"\n  {path}\n" in printed
