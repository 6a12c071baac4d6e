"""The comparison of rules runs, and measures what its tables say."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip

pytestmark = pytest.mark.thorough

TUNED = "clip_by_global_norm"


@pytest.fixture(scope="module")
def compared(study):
    return study("rules_compared")


@pytest.fixture(scope="module")
def rules(study):
    return study("_rules")


@pytest.fixture(scope="module")
def tasks(study):
    return study("_corrupted_tasks")


@pytest.fixture(scope="module")
def quick(run_study):
    """Runs the quick mode once: the results, the output, the folder of the figure."""
    return run_study("rules_compared", "--quick", "--rules", TUNED)


def made_up(compared, scores, start=10.0):
    """Makes the result of a rule from its scores `[seeds, steps]`."""
    scores = np.atleast_2d(np.asarray(scores, np.float64))
    return compared.Result(np.full(len(scores), start), scores, math.nan)


def test_runs_are_lost_without_a_clip_and_none_with_one(compared, quick):
    results, *_ = quick
    assert set(results) == {("regression", name) for name in compared.OPTIMIZERS}
    for found in results.values():
        assert compared.is_lost(found["none"]).all()
        assert not compared.is_lost(found[TUNED]).any()
        assert (compared.final_score(found[TUNED].score) < 1000).all()  # from 26000


def test_the_threshold_is_tuned_for_each_optimizer(rules, tasks, quick):
    grid = rules.try_norms(tasks.TASKS["regression"]().norm).tolist()
    for found in quick[0].values():
        assert (
            found[TUNED].threshold in grid[1:-1]
        )  # it would be at the end if too short
        assert math.isnan(found["none"].threshold)


def test_the_guard_leaves_out_a_batch_of_nan(tasks, quick):
    faults = tasks.make_faults(120)
    step = np.flatnonzero(faults == tasks.NAN)[0]
    for found in quick[0].values():
        score = found[TUNED].score
        np.testing.assert_array_equal(score[:, step], score[:, step - 1])
        assert (score[:, step - 1] != score[:, step - 2]).all()


def test_the_tables_name_the_rules(quick):
    lines = quick[1].splitlines()
    for rule in ("none", TUNED):
        assert sum(line.startswith(f"{rule} ") for line in lines) == 3  # tables
    assert "regression, momentum" in lines and "regression, Adam" in lines


def test_the_figure_is_written_and_named(quick):
    _, printed, folder = quick
    path = folder / "rules_regression.png"
    assert path.stat().st_size > 10_000
    assert printed.endswith(f"Figures:\n  {path}\n")


def test_every_rule_fits_into_the_optimizer(rules):
    params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
    lane = rules.Lane(jnp.array(True), jnp.array(1.0), 0)

    def one_step(name):
        optimizer = rules.make_optimizer("regression", name, lane)
        return optimizer.update(params, optimizer.init(params), params)

    for name in rules.RULES:
        updates, _ = jax.eval_shape(lambda name=name: one_step(name))
        assert jax.tree.structure(updates) == jax.tree.structure(params), name


@pytest.mark.parametrize("is_adam", [False, True])
def test_steps_are_clipped_behind_adam_and_before_momentum(rules, is_adam):
    clip, scale = optaxclip.clip_by_global_norm(0.02), optax.scale(-0.1)
    parts = [scale, clip, optax.trace(rules.MOMENTUM)]
    if is_adam:
        parts = [optax.scale_by_adam(), scale, clip]
    own = optax.chain(*parts)
    moments = rules.adam_or_momentum(jnp.array(is_adam))
    placed = rules.each_step(clip, moments, 0.1)
    params = jnp.zeros(2)
    states = own.init(params), placed.init(params)
    for grads in jnp.array([[3.0, -4.0], [0.03, 0.04]]):
        expected, first = own.update(grads, states[0])
        updates, second = placed.update(grads, states[1])
        states = first, second
        chex.assert_trees_all_close(updates, expected, rtol=1e-6)


@pytest.mark.parametrize("is_adam", [False, True])
def test_the_traced_choice_is_one_of_the_two_optimizers(rules, is_adam):
    own = optax.scale_by_adam() if is_adam else optax.trace(rules.MOMENTUM)
    either = optax.chain(*rules.adam_or_momentum(jnp.array(is_adam)))
    params = jnp.zeros(2)
    states = own.init(params), either.init(params)
    for grads in jnp.array([[1.0, -2.0], [0.5, 3.0]]):
        expected, first = own.update(grads, states[0])
        updates, second = either.update(grads, states[1])
        states = first, second
        np.testing.assert_array_equal(updates, expected)


def test_every_fault_has_its_place_and_its_effect(tasks):
    for steps in (120, 300):
        faults = tasks.make_faults(steps)
        kinds, counts = np.unique(faults, return_counts=True)
        assert dict(zip(kinds, counts, strict=True)) == {
            tasks.GOOD: steps - 8,
            tasks.SHUFFLED: 2,
            tasks.SCALED: 2,
            tasks.NAN: 4,
        }
        assert np.flatnonzero(faults)[0] >= 10
    x, y = jnp.ones((3, 2)), jnp.arange(3)
    for fault, wanted in {
        tasks.GOOD: (x, y),
        tasks.SHUFFLED: (x, jnp.array([2, 0, 1])),
        tasks.SCALED: (1000 * x, y),
        tasks.NAN: (jnp.nan * x, y),
    }.items():
        found = tasks.spoil(fault, x, y, (1000.0, 1.0))
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_a_spike_is_measured_against_the_steps_before_it(compared):
    middle = np.full(40, 2.0)
    middle[:3], middle[12] = 90.0, 8.0  # long before, and after it
    assert compared.BEFORE == 10 and compared.spike(middle) == 4.0
    assert compared.spike(np.full(40, np.inf)) == np.inf
    middle[20:] = np.inf
    assert compared.spike(middle) == np.inf


def test_a_run_that_ends_above_its_start_is_lost(compared):
    scores = np.full((4, 30), 1.0)
    scores[1, -1] = 1e9  # one bad step of the last twenty
    scores[2], scores[3] = 11.0, math.nan
    result = made_up(compared, scores)
    assert compared.is_lost(result).tolist() == [False, False, True, True]
    assert compared.judged(result).tolist() == [1.0, 1.0, math.inf, math.inf]


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
        ("--steps", "119", "expected at least 120, for all the faults"),
        ("--tasks", "chess", "invalid choice: 'chess'"),
        ("--rules", "clap", "invalid choice: 'clap'"),
    ],
)
def test_bad_options_say_what_was_expected(compared, capsys, option, value, message):
    with pytest.raises(SystemExit) as exit_info:
        compared.main([option, value])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_the_figure_shows_rules_of_one_optimizer_too(compared, tasks):
    result = compared.Result(np.full(2, 3.0), np.ones((2, 120)), math.nan)
    lost = result._replace(score=np.full((2, 120), 4.0))
    spiked = result._replace(
        score=np.where(np.arange(120) < 60, 1.0, 2.5) + 0 * result.score
    )
    results = {
        ("digits", "momentum"): {"none": result, TUNED: result, "acclip": spiked},
        ("digits", "Adam"): {"none": result, TUNED: result, "stable_adamw": lost},
    }
    faults = tasks.make_faults(120)
    figure = compared.plot_spike("digits", results, faults)
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert titles == ["none", TUNED, "acclip", "stable_adamw"]
    text = figure.get_suptitle()
    assert "twice that before: 2 of 3 with momentum, 2 of 3 with Adam" in text
