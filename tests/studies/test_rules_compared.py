"""The comparison of rules runs, and measures what its tables say."""

import contextlib
import importlib
import io
import math
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure

import optaxclip

STUDIES = Path(__file__).parents[2] / "benchmarks" / "studies"
TUNED = "clip_by_global_norm"


@pytest.fixture(scope="module")
def compared():
    """Imports the study from its folder, as running it as a script does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STUDIES))
        yield importlib.import_module("rules_compared")


@pytest.fixture(scope="module")
def quick(compared, tmp_path_factory):
    """Runs the quick mode once: the results, the output, the folder of the figure."""
    folder = tmp_path_factory.mktemp("figures") / "new" / "folder"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        results = compared.main(["--quick", "--rules", TUNED, "--out", str(folder)])
    return results, printed.getvalue(), folder


def made_up(compared, scores, start=10.0):
    """Makes the result of a rule from its scores `[seeds, steps]`."""
    scores = np.atleast_2d(np.asarray(scores, np.float64))
    zeros = np.zeros(scores.shape)
    history = compared.History(scores, zeros, zeros, zeros.astype(bool))
    return compared.Result(np.full(len(scores), start), history, math.nan)


def test_runs_are_lost_without_a_clip_and_none_with_one(compared, quick):
    results, *_ = quick
    assert set(results) == {("regression", name) for name in compared.OPTIMIZERS}
    for found in results.values():
        assert compared.is_lost(found["none"]).all()
        assert not compared.is_lost(found[TUNED]).any()
        assert (compared.final_score(found[TUNED].history) < 1000).all()  # from 26000


def test_the_threshold_is_tuned_for_each_optimizer(compared, quick):
    grid = compared.try_norms(compared.TASKS["regression"]().norm).tolist()
    for found in quick[0].values():
        assert (
            found[TUNED].threshold in grid[1:-1]
        )  # it would be at the end if too short
        assert math.isnan(found["none"].threshold)


def test_a_clip_bounds_the_norm_and_leaves_the_guard_the_nan(compared, quick):
    faults = compared.make_faults(compared.SHORTEST)
    for found in quick[0].values():
        history, limit = found[TUNED].history, found[TUNED].threshold
        np.testing.assert_array_less(history.norm_after, 1.0001 * limit)
        clipped = history.norm_before > 1.0001 * limit
        np.testing.assert_array_equal(history.changed[clipped], True)
        assert (history.norm_before[:, faults == compared.SCALED] > 1e5).all()
        # A batch of NaN leaves all as it was.
        step = np.flatnonzero(faults == compared.NAN)[0]
        for field in history:
            np.testing.assert_array_equal(field[:, step], field[:, step - 1])


def test_the_tables_name_the_rules_and_what_to_use(quick):
    lines = quick[1].splitlines()
    for rule in ("none", TUNED):
        assert sum(line.startswith(f"{rule} ") for line in lines) == 3  # tables
    assert "regression, momentum" in lines and "regression, Adam" in lines
    assert any("Adam, a threshold tuned: clip_by_global_norm" in x for x in lines)
    assert any("momentum, none to tune: nothing" in x for x in lines)
    assert "CPU seconds after imports" in lines[-3]  # the figure follows


def test_the_figure_is_written_and_named(quick):
    _, printed, folder = quick
    path = folder / "rules_regression.png"
    assert path.stat().st_size > 10_000
    assert printed.endswith(f"Figures:\n  {path}\n")


def test_every_rule_fits_into_the_optimizer(compared):
    params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
    lane = compared.Lane(jnp.array(True), jnp.array(1.0), 0)

    def one_step(name):
        optimizer = compared.make_optimizer("regression", name, lane)
        state = optimizer.init(params)
        return optimizer.update(params, state, params)

    for name in compared.RULES:
        updates, state = jax.eval_shape(lambda name=name: one_step(name))
        assert jax.tree.structure(updates) == jax.tree.structure(params), name
        assert optax.tree.get(state, "changed").shape == (), name


def test_watching_a_rule_changes_nothing_and_sees_both_norms(compared):
    clip = optaxclip.clip_by_global_norm(1.0)
    watched, grads = compared.watched(clip), jnp.array([3.0, 4.0])
    updates, state = watched.update(grads, watched.init(grads))
    np.testing.assert_array_equal(updates, clip.update(grads, clip.init(grads))[0])
    np.testing.assert_allclose(state.norm_before, 5.0)
    np.testing.assert_allclose(state.norm_after, 1.0)
    assert state.changed
    assert not watched.update(0.1 * grads, state)[1].changed


@pytest.mark.parametrize("is_adam", [False, True])
def test_steps_are_clipped_behind_adam_and_before_momentum(compared, is_adam):
    clip, scale = optaxclip.clip_by_global_norm(0.02), optax.scale(-0.1)
    parts = [scale, clip, optax.trace(compared.MOMENTUM)]
    if is_adam:
        parts = [optax.scale_by_adam(), scale, clip]
    own = optax.chain(*parts)
    moments = compared.adam_or_momentum(jnp.array(is_adam))
    placed = compared.each_step(clip, moments, 0.1)
    params = jnp.zeros(2)
    states = own.init(params), placed.init(params)
    for grads in jnp.array([[3.0, -4.0], [0.03, 0.04]]):
        expected, first = own.update(grads, states[0])
        updates, second = placed.update(grads, states[1])
        states = first, second
        chex.assert_trees_all_close(updates, expected, rtol=1e-6)
    after = optax.tree.get(states[1], "norm_after")  # in units of the learning rate
    np.testing.assert_allclose(after, 0.2 if is_adam else 0.05, rtol=1e-6)


@pytest.mark.parametrize("is_adam", [False, True])
def test_the_traced_choice_is_one_of_the_two_optimizers(compared, is_adam):
    own = optax.scale_by_adam() if is_adam else optax.trace(compared.MOMENTUM)
    either = optax.chain(*compared.adam_or_momentum(jnp.array(is_adam)))
    params = jnp.zeros(2)
    states = own.init(params), either.init(params)
    for grads in jnp.array([[1.0, -2.0], [0.5, 3.0]]):
        expected, first = own.update(grads, states[0])
        updates, second = either.update(grads, states[1])
        states = first, second
        np.testing.assert_array_equal(updates, expected)


def test_every_fault_has_its_place_and_its_effect(compared):
    for steps in (compared.SHORTEST, 300):
        faults = compared.make_faults(steps)
        kinds, counts = np.unique(faults, return_counts=True)
        assert dict(zip(kinds, counts, strict=True)) == {
            compared.GOOD: steps - 8,
            compared.SHUFFLED: 2,
            compared.SCALED: 2,
            compared.NAN: 4,
        }
        assert np.flatnonzero(faults)[0] >= compared.BEFORE
    x, y = jnp.ones((3, 2)), jnp.arange(3)
    for fault, wanted in {
        compared.GOOD: (x, y),
        compared.SHUFFLED: (x, jnp.array([2, 0, 1])),
        compared.SCALED: (1000 * x, y),
        compared.NAN: (jnp.nan * x, y),
    }.items():
        found = compared.spoil(fault, x, y, (1000.0, 1.0))
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_a_spike_is_measured_against_the_steps_before_it(compared):
    faults = np.zeros(60, int)
    faults[20], faults[40] = compared.SCALED, compared.SHUFFLED
    scores = np.full((2, 60), 2.0)
    scores[0, 20:25] = [4.0, 8.0, 6.0, 3.0, 2.1]  # back after the largest, at 1.1 x 2
    scores[0, 40:43] = [2.0, 3.0, 2.1]  # the harm is done by the step after it
    scores[1, 40:] = math.inf  # never back
    heights, waits = compared.spikes(made_up(compared, scores), faults)
    np.testing.assert_allclose(heights, [[4.0, 1.5], [1.0, math.inf]])
    np.testing.assert_allclose(waits, [[4.0, 2.0], [0.0, math.inf]])


def test_a_run_that_ends_above_its_start_is_lost(compared):
    scores = np.full((4, 30), 1.0)
    scores[1, -1] = 1e9  # one bad step of the last twenty
    scores[2], scores[3] = 11.0, math.nan
    result = made_up(compared, scores)
    assert compared.is_lost(result).tolist() == [False, False, True, True]
    assert compared.judged(result).tolist() == [1.0, 1.0, math.inf, math.inf]
    assert compared.quartiles([1.0, 2.0, math.inf]).tolist() == [1.5, 2.0, math.inf]


def test_ranks_are_shared_and_losses_need_a_margin_and_most_seeds(compared):
    def rule(*finals):
        return made_up(compared, np.repeat(np.array(finals)[:, None], 30, axis=1))

    results = {
        ("digits", "Adam"): {
            TUNED: rule(1.0, 1.0, 1.0, 1.0),
            "equal": rule(1.0, 1.0, 1.0, 1.0),
            "near": rule(1.04, 1.04, 1.04, 1.04),
            "split": rule(1.3, 1.3, 0.9, 0.9),
            "worse": rule(1.3, 1.3, 1.3, 0.9),
            "dead": rule(99.0, 99.0, 99.0, 99.0),
        }
    }
    ranks = {TUNED: 1.5, "equal": 1.5, "near": 3, "split": 4, "worse": 5, "dead": 6}
    assert compared.mean_ranks(results) == ranks
    losing = [rule for rule in ranks if compared.losses(results, rule) != "nowhere"]
    assert losing == ["worse", "dead"]
    assert compared.losses(results, "dead") == "digits/Adam"
    assert compared.lost_runs(results, "dead") == 4


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--seeds", "0", "expected a whole number >= 1, got '0'"),
        ("--steps", "ten", "expected a whole number >= 1, got 'ten'"),
        ("--steps", "119", "expected at least 120, for all the faults"),
        ("--tasks", "chess", "invalid choice: 'chess'"),
        ("--rules", "clap", "invalid choice: 'clap'"),
        ("--out", __file__, "expected a folder to write to"),
    ],
)
def test_bad_options_say_what_was_expected(compared, capsys, option, value, message):
    with pytest.raises(SystemExit) as exit_info:
        compared.main([option, value])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_the_figure_shows_rules_of_one_optimizer_too(compared, monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: figures.append(self))
    faults = compared.make_faults(120)
    history = compared.History(*[np.ones((2, 120))] * 4)
    result = compared.Result(np.ones(2), history, math.nan)
    results = {
        ("digits", "momentum"): {"none": result, "acclip": result},
        ("digits", "Adam"): {"none": result, "stable_adamw": result},
    }
    compared.plot_spike("digits", results, faults, tmp_path / "figure.png")
    titles = [ax.get_title() for ax in figures[0].axes if ax.get_title()]
    assert titles == ["none", "acclip", "stable_adamw"]
