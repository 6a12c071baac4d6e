"""Each verdict is given where it is due, with its evidence, and not right beside."""

import numpy as np
import pytest

import optaxclip
from made_up import INF, NAN, clipped, flat, healthy, noisy
from optaxclip import diagnose
from optaxclip._advice.diagnose import BAD


def bad(history, params=None):
    return [name for name in diagnose(history, params) if name in BAD]


def with_end(history, first, **columns):
    """From row ``first`` on, other numbers, which go on with the last of them."""
    for name, values in columns.items():
        tail = history[name][first:]
        tail[:] = np.resize(values, len(tail)) if np.size(values) == 1 else tail
        tail[: np.size(values)] = values
        tail[np.size(values) :] = np.atleast_1d(values)[-1]
    return history


def test_a_healthy_run_is_healthy_in_numbers():
    history = healthy()
    assert list(diagnose(history)) == ["healthy"]
    last = np.median(history["loss"][-3:])
    middle, high = np.percentile(history["norm"], [50, 90])
    assert diagnose(history)["healthy"] == (
        "HEALTHY: 200 steps, all finite."
        f" Loss: {history['loss'][0]:.3g} at first, {last:.3g} at the end."
        f" Gradient norms: median {middle:.3g}, 90 % below {high:.3g},"
        f" largest {history['norm'].max():.3g}."
    )


def test_a_norm_that_stands_out_alone_is_told_but_is_no_fault():
    history = healthy()
    history["norm"][120] *= 50
    verdicts = diagnose(history)
    assert list(verdicts) == ["healthy"]
    assert " 1 stood out from their neighbours, at most" in verdicts["healthy"]
    assert "the loss did not follow" in verdicts["healthy"]


# not_finite, and exploded


def test_a_nan_that_nothing_announced_is_not_finite():
    history = with_end(healthy(), 150, loss=NAN, norm=NAN)
    assert bad(history) == ["not_finite"]
    text = diagnose(history)["not_finite"]
    assert text.startswith(
        "NOT FINITE at step 150; the norm before was 1.59 (median 2)"
    )
    assert "Nothing grew before, so it is no explosion, and a clip can't repair" in text
    assert "`skip_if_nonfinite(optimizer)` keeps such a step out" in text


def test_a_nan_that_growing_norms_announced_is_an_explosion():
    growth = 2 * np.geomspace(4, 4**8, 8)
    history = with_end(healthy(), 142, norm=[*growth, NAN], loss=[*growth, NAN])
    assert bad(history) == ["exploded"]
    text = diagnose(history)["exploded"]
    assert text.startswith("EXPLODED at step 150. The gradient norm grew from ")
    assert "from 2.68 to 1.31e5 in the 8 steps before, about x 3.92 a" in text
    assert "Divide the learning rate by ten, or clip: with SGD not at the norms" in text
    assert "`suggest_max_norm(optimizer, params)` names a threshold" in text


def test_a_norm_that_grew_less_than_tenfold_before_a_nan_is_no_explosion():
    history = with_end(healthy(), 147, norm=[3.0, 5.0, 8.0, NAN], loss=[1, 1, 1, NAN])
    assert bad(history) == ["not_finite"]


def test_a_slow_explosion_is_told_from_where_it_began():
    growth = 2 * np.geomspace(1, 1e6, 50)
    history = with_end(healthy(), 100, norm=[*growth, NAN], loss=[*growth, NAN])
    assert bad(history) == ["exploded"]
    assert "in the 45 steps before, about x 1.3" in diagnose(history)["exploded"]


def test_an_explosion_without_norms_is_told_by_the_loss():
    history = with_end(healthy(), 140, loss=[5.0, 100.0, 1e5, 1e9, 1e20, NAN])
    del history["norm"]
    assert bad(history) == ["exploded"]
    assert "The loss grew from 1.3 to 1e20 in the 5" in diagnose(history)["exploded"]


def test_a_few_rows_that_rise_one_by_one_are_an_explosion_too():
    norm = np.array([2.6, 2.6, 2.6, 2.8, 3.4, 5.9, 19.0, 60.0, NAN, NAN])
    assert bad({"norm": norm}) == ["exploded"]
    assert bad({"norm": norm[[0, 6, 1, 7, 2, 5, 3, 6, 8, 9]]}) == ["not_finite"]


def test_norms_that_fell_for_long_explode_above_what_they_were_last():
    history = healthy()
    history["norm"] *= np.geomspace(1000, 0.1, 200)
    history = with_end(history, 194, norm=[1, 5, 25, 100, NAN], loss=[1, 1, 1, 9, NAN])
    assert np.nanmedian(history["norm"]) > 10  # and yet a hundred is much by then
    assert bad(history) == ["exploded"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"every": 100}, "an explosion takes a few steps, and would not show between"),
        ({"rows": 155}, "Nothing grew before"),
    ],
)
def test_between_distant_rows_an_explosion_is_not_excluded(change, words):
    history = with_end(healthy(**change), 150, loss=NAN, norm=NAN)
    assert words in diagnose(history)["not_finite"]


def test_without_norms_an_explosion_is_not_excluded():
    history = with_end(healthy(), 150, loss=NAN)
    del history["norm"]
    assert "Log the gradient norm: without it" in diagnose(history)["not_finite"]


def test_after_a_few_rows_an_explosion_is_not_excluded():
    history = with_end(healthy(12), 4, loss=NAN, norm=NAN)
    assert "The rows before are too few to say" in diagnose(history)["not_finite"]


def test_near_the_end_of_float16_this_is_named():
    history = with_end(healthy(), 150, loss=NAN, norm=NAN)
    history["norm"] = history["norm"] * 20000 / history["norm"][149]
    text = diagnose(history)["not_finite"]
    assert "the norm before was 2e4 (median 2." in text
    assert "0.305 times what float16 can hold" in text
    history["norm"] /= 1000
    assert "can hold" not in diagnose(history)["not_finite"]


def test_what_is_nan_from_the_start_is_so_before_any_step():
    history = {"step": np.arange(20), "loss": np.full(20, NAN)}
    text = diagnose(history)["not_finite"]
    assert (
        "NOT FINITE from the first row on, step 0. If that is the very first step,"
        in text
    )
    history["step"] += 500
    assert "What came before is not in the log" in diagnose(history)["not_finite"]


def test_a_loss_of_zero_beside_a_nan_norm_is_a_nan():
    history = with_end(healthy(), 150, loss=0.0, norm=NAN)
    assert bad(history) == ["not_finite"]
    assert "A loss of exactly 0 beside it is a NaN" in diagnose(history)["not_finite"]


def test_a_loss_that_is_zero_at_once_without_norms_may_be_a_nan():
    history = with_end(healthy(), 150, loss=0.0)
    del history["norm"]
    assert bad(history) == ["not_finite"]
    text = diagnose(history)["not_finite"]
    assert "NOT FINITE, it seems, at step 150: the loss was 1.2" in text


def test_a_loss_that_came_down_to_zero_by_itself_is_no_nan():
    losses = np.round(np.geomspace(2, 1e-8, 100), 5)
    assert "not_finite" not in diagnose({"loss": losses})


def test_norms_that_are_infinite_beside_a_flat_loss_say_that_nothing_moves():
    history = {"loss": flat(2.9, 40), "norm": np.full(40, INF)}
    text = diagnose(history)["not_finite"]
    assert "The loss stays finite all the same: apparently no step is taken" in text


def test_a_guard_that_skips_to_the_end_is_told():
    history = with_end(healthy(), 150, norm=NAN)
    history["loss"][150:] = flat(1.2, 50)
    history = optaxclip.history(history)
    history["skipped"] = history["nonfinite"]
    text = diagnose(history)["not_finite"]
    assert "A guard skips every step since: the weights are sound" in text
    assert "keeps such a step out" not in text


# overflow_skips


def test_single_infinite_steps_of_a_run_that_goes_on_are_skips():
    history = healthy()
    history["norm"][[30, 90, 91, 197]] = INF
    verdicts = diagnose(history)
    assert list(verdicts) == ["overflow_skips", "healthy"]
    text = verdicts["overflow_skips"]
    assert "4 of 200 rows (steps 30, 90, 91, 197), apparently skipped" in text
    assert "rare." in text


def test_the_search_for_a_scale_at_the_start_is_no_fault():
    history = healthy()
    history["norm"][:6] = INF
    assert list(diagnose(history)) == ["overflow_skips", "healthy"]


def test_a_guard_that_skipped_is_named_and_many_skips_are_not_rare():
    history = healthy()
    history["norm"][::10] = NAN
    history = optaxclip.history(history)
    history["skipped"] = history["nonfinite"]
    text = diagnose(history)["overflow_skips"]
    assert "a guard skipped; the run went on" in text
    assert "as long as it is rare, which it is not here." in text


def test_an_average_with_an_infinite_step_in_it_is_no_fault():
    history = with_end(healthy(60), 20, norm=INF)
    assert list(diagnose(history)) == ["overflow_skips", "healthy"]
    assert "NOT FINITE NORMS from step 20 on" in diagnose(history)["overflow_skips"]


def test_one_nan_and_then_nan_for_good_is_not_finite():
    history = with_end(healthy(), 150, loss=NAN, norm=NAN)
    history["loss"][100] = history["norm"][100] = NAN
    verdicts = diagnose(history)
    assert list(verdicts) == ["not_finite", "overflow_skips"]
    assert "at step 150" in verdicts["not_finite"]


def test_a_nan_loss_with_a_lull_of_two_rows_is_no_skip():
    history = with_end(healthy(), 150, loss=NAN, norm=NAN)
    history["loss"][147] = history["norm"][147] = NAN
    assert "at step 147" in diagnose(history)["not_finite"]


# clipping


def test_a_threshold_below_all_norms_is_told():
    history = healthy() | clipped(healthy()["norm"], 0.5)
    verdicts = diagnose(history)
    assert list(verdicts) == ["always_clipped", "healthy"]
    text = verdicts["always_clipped"]
    assert "CLIPPED AT 100 % of the steps: the threshold 0.5 is below all" in text
    assert "learning rate x threshold then: tune the two as one" in text


def test_a_threshold_far_above_all_norms_is_a_safety_net():
    norm = noisy(2.0, 200, 0.1, 1)
    verdicts = diagnose(healthy() | {"norm": norm} | clipped(norm, 9.0))
    assert list(verdicts) == ["never_clipped", "healthy"]
    text = verdicts["never_clipped"]
    assert "the threshold is 9, the largest norm was 2.6" in text
    assert "would catch the largest 1 % of the steps" in text


@pytest.mark.parametrize("max_norm", [2.0, 7.0])
def test_a_threshold_among_the_norms_or_near_them_is_not_told(max_norm):
    norm = noisy(2.0, 200, 0.1, 1)
    history = healthy() | {"norm": norm} | clipped(norm, max_norm)
    assert list(diagnose(history)) == ["healthy"]


def test_scopes_that_are_all_clipped_are_told_without_a_threshold():
    factors = {"clip/factor/a": np.full(200, 0.5), "clip/factor/b": np.full(200, 0.3)}
    text = diagnose(healthy() | factors)["always_clipped"]
    assert "CLIPPED AT 100 % of the steps, in every scope" in text
    factors["clip/factor/b"][:100] = 1.0
    assert list(diagnose(healthy() | factors)) == ["healthy"]


# too_short


def test_nine_rows_are_too_short_and_ten_are_not():
    assert list(diagnose(healthy(9))) == ["too_short"]
    assert "TOO SHORT: 9 finite rows, and" in diagnose(healthy(9))["too_short"]
    assert list(diagnose(healthy(10))) == ["healthy"]


def test_an_excerpt_says_where_it_begins():
    history = healthy(6, every=10)
    history["step"] += 4000
    assert "6 finite rows that begin at step 4000" in diagnose(history)["too_short"]
