"""What `plot.thresholds` and `plot.sweep` tell of a threshold."""

import numpy as np
import pytest

from drawn import lines, new, saved, texts, title
from helpers import oc

RNG = np.random.default_rng(0)
NORMS = np.exp(RNG.normal(size=501))
CLIP = {"clip/norm": NORMS, "clip/max_norm": np.full(501, 2.0)}


def test_the_line_is_the_share_of_the_steps_that_each_threshold_clips():
    ax = oc.plot.thresholds({"norm": NORMS}, ax=new())
    x, y = ax.lines[0].get_data()
    for threshold in np.quantile(NORMS, [0.03, 0.3, 0.77]):
        at = np.flatnonzero(x <= threshold)[-1]
        assert y[at] == pytest.approx(100 * np.mean(NORMS > threshold))
    assert ax.get_xscale() == "log"


def test_a_row_counts_as_often_as_it_stands_for_steps():
    history = {"norm": [1.0, 2.0, 3.0], "width": [7, 2, 1], "step": [6, 8, 9]}
    history["nonfinite"] = [0, 0, 0]
    x, y = oc.plot.thresholds(history, ax=new()).lines[0].get_data()
    found = dict(zip(x, y, strict=True))
    assert [found[norm] for norm in (1.0, 2.0, 3.0)] == pytest.approx([30, 10, 0])


def test_marked_are_half_a_tenth_the_own_threshold_and_the_suggestion():
    history = {"norm": NORMS, "clip/factor": np.minimum(1, 2 / NORMS), **CLIP}
    ax = oc.plot.thresholds(history, 0.7, new())
    places = [line.get_xdata()[0] for line in ax.lines[1:]]
    middle, high = np.sort(NORMS)[[250, 450]]
    assert places == pytest.approx([middle, high, 2.0, 0.7])
    words = [f"50 % clipped at {middle:.3g}", f"10 % clipped at {high:.3g}"]
    assert {*words, "yours: 2", "suggested: 0.7"} <= set(texts(ax))
    share = 100 * np.mean(NORMS > 0.7)
    assert title(ax) == (
        f"A threshold of 0.7 would have clipped {share:.0f} % of these steps"
    )
    assert "suggested: 0.7" in saved(ax)


def test_behind_the_line_is_a_histogram_of_all_finite_norms():
    norms = np.append(NORMS, [np.nan, 0.0])
    ax = oc.plot.thresholds({"norm": norms[::-1]}, ax=new())
    _, behind = ax.figure.axes
    assert sum(bar.get_height() for bar in behind.patches) == len(NORMS)


def test_norms_of_a_run_that_did_not_stay_finite_are_called_no_guide():
    ax = oc.plot.thresholds({"norm": [1.0, 50.0, np.inf]}, ax=new())
    assert title(ax).endswith("no guide to a threshold")


def test_thresholds_need_a_norm_and_a_positive_suggestion():
    with pytest.raises(ValueError, match=r"finite norms above 0 .* got step, width, l"):
        oc.plot.thresholds({"loss": [1.0]})
    with pytest.raises(ValueError, match="suggestion above 0, got -1"):
        oc.plot.thresholds({"norm": [1.0]}, -1)


MAX_NORMS = np.array([0.1, 1.0, 10.0, 100.0])
LOSSES = np.array([[5, 6, 7], [1, 2, 3], [2.05, 2, np.nan], [np.inf, np.nan, 4]])


def test_the_line_of_a_sweep_is_the_median_in_which_a_lost_run_is_the_worst():
    ax = oc.plot.sweep(MAX_NORMS, LOSSES, ax=new())
    ((x, y),) = lines(ax, marker="o")
    np.testing.assert_array_equal(x, MAX_NORMS)
    np.testing.assert_array_equal(y, [6, 2, 2.05, np.inf])
    assert title(ax) == "Best: 1; within 5 %: 1 to 10; of 12 runs 3 are lost"
    assert saved(ax)


def test_every_run_of_a_sweep_is_a_dot_and_lost_ones_are_crosses_at_the_top():
    ax = oc.plot.sweep(MAX_NORMS, LOSSES, ax=new())
    ((_, dots),) = lines(ax, marker=".")
    assert sorted(dots) == sorted(LOSSES[np.isfinite(LOSSES)])
    ((x, heights),) = lines(ax, marker="x")
    assert list(x) == [10, 100]
    assert heights.min() > 0.9
    assert {"1 of 3", "2 of 3"} <= set(texts(ax))


def test_within_five_percent_of_the_best_is_shaded_up_to_halfway_to_the_next():
    ax = oc.plot.sweep(MAX_NORMS, LOSSES, ax=new())
    spans = sorted((x.get_x(), x.get_x() + x.get_width()) for x in ax.patches)
    np.testing.assert_allclose(spans, np.sqrt([[0.1, 10], [10, 1000]]))


def test_a_sweep_is_drawn_in_the_order_of_its_thresholds_and_of_one_seed_too():
    ax = oc.plot.sweep([10.0, 0.1, 1.0], [3.0, 1.0, np.nan], 0.5, new())
    ((x, y),) = lines(ax, marker="o")
    np.testing.assert_array_equal(x, [0.1, 1, 10])
    np.testing.assert_array_equal(y, [1, np.inf, 3])
    assert {"lost", "suggested: 0.5"} <= set(texts(ax))
    assert any(set(line.get_xdata()) == {0.5} for line in ax.lines)


def test_no_clip_is_right_of_all_thresholds():
    ax = oc.plot.sweep([np.inf, 1.0, 2.0], [1.0, 3.0, 2.0], ax=new())
    ((x, y),) = lines(ax, marker="o")
    assert x[-1] > 2
    assert list(y) == [3, 2, 1]
    assert "no clip" in texts(ax)
    assert title(ax) == "Best: no clip"


def test_what_is_far_above_the_best_does_not_press_the_others_flat():
    ax = oc.plot.sweep(MAX_NORMS, [1.0, 1.2, 2.0, 1e30], ax=new())
    assert ax.get_ylim()[1] < 3
    ((x, _),) = lines(ax, marker="^")
    assert list(x) == [100]


@pytest.mark.parametrize("losses", [[-3.0, -2.0], [np.nan, np.nan], [0.01, 1.0]])
def test_a_sweep_can_be_negative_lost_or_wide(losses):
    ax = oc.plot.sweep([1.0, 2.0], losses, ax=new())
    is_wide = losses[0] == 0.01
    assert ax.get_yscale() == ("log" if is_wide else "linear")
    assert title(ax).startswith("No threshold" if np.isnan(losses[0]) else "Best: 1")
    assert saved(ax)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 0.0], [1.0, 2.0]), "thresholds above 0"),
        (([[1.0]], [1.0]), r"shape \[thresholds\]"),
        (([1.0, 2.0], [1.0]), r"\[2\] or \[2, seeds\].* got shape \[1\]"),
        (([1.0], [1.0], np.nan), "suggestion above 0, got nan"),
    ],
)
def test_a_sweep_says_what_it_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        oc.plot.sweep(*arguments)
