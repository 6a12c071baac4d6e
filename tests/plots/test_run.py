"""What `plot.run` draws of a run, whatever its log tells."""

import sys

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot

import small_runs
from drawn import hatched, lines, new, saved, texts, title
from helpers import oc

RNG = np.random.default_rng(0)


def drawn(history):
    return oc.plot.run(history, new(2))


def filled(ax, label):
    """The corners of the areas of a name."""
    areas = [x for x in ax.collections if x.get_label() == label]
    return np.concatenate([path.vertices for x in areas for path in x.get_paths()])


def test_loss_and_norm_are_lines_through_every_row():
    history = small_runs.dead()
    loss, norm = drawn(history)
    np.testing.assert_array_equal(loss.lines[0].get_ydata(), history["loss"])
    np.testing.assert_array_equal(norm.lines[0].get_ydata(), history["norm"])
    np.testing.assert_array_equal(norm.lines[0].get_xdata(), history["step"])
    assert norm.get_yscale() == "log"


def test_the_threshold_is_dashed_and_named_where_it_ends():
    _, norm = drawn(small_runs.dead())
    ((_, heights),) = lines(norm, linestyle="--")
    assert set(heights) == {600.0}
    assert "clip at 600" in texts(norm)


def test_the_area_from_the_threshold_to_the_norm_is_what_the_clip_took_away():
    history = small_runs.dead()
    _, norm = drawn(history)
    x, y = filled(norm, "clipped away").T
    above = history["step"][history["norm"] > 600]
    assert y.min() == 600
    assert y.max() == history["norm"].max()
    assert above.min() - 1 < x.min() <= above.min()
    assert above.max() <= x.max() < above.max() + 1
    assert "clipped away" in texts(norm)


def test_bars_at_the_bottom_are_the_share_of_steps_clipped():
    history = {name: column[:100] for name, column in small_runs.dead().items()}
    loss, norm = drawn(history)
    (bars,) = [x.get_data() for x in norm.patches]
    np.testing.assert_allclose(bars.values, 0.08 * history["clipped"])
    np.testing.assert_array_equal(bars.edges, range(101))
    share = 100 * history["clipped"].mean()
    assert (
        title(loss)
        == f"Clipped at {share:.0f} % of the steps: shaded, what it took away"
    )


def test_what_is_not_finite_to_the_end_is_hatched_from_its_first_step_on():
    history = small_runs.exploding()
    first = int(np.argmax(history["nonfinite"]))
    loss, norm = drawn(history)
    assert hatched(loss) == hatched(norm) == [(first, 2 * first - 1)]
    assert title(loss) == f"Not finite from step {first} on"
    assert f"not finite from step {first} on (to step 639)" in texts(loss)


def test_the_growth_before_a_crash_is_that_of_the_verdict():
    history = small_runs.exploding()
    _, norm = drawn(history)
    (text,) = [x for x in texts(norm) if "a step" in x]
    assert text.startswith("last 5 rows: ")
    assert f"about {text.split(': ')[1]}" in oc.diagnose(history)["exploded"]
    (inset,) = norm.child_axes
    np.testing.assert_array_equal(inset.lines[0].get_ydata(), history["norm"][:5])


def test_where_the_loss_alone_grew_the_growth_is_beside_the_loss():
    loss, norm = drawn({"loss": [3.0, 2.0, 3.0, 40.0, 9e5, np.nan]})
    assert len(loss.child_axes) == 1
    assert not norm.child_axes


def test_what_did_not_grow_has_no_inset():
    axes = drawn({"loss": [3.0, 2.0, 2.1, np.nan], "norm": [1.0, 1.1, 1.0, np.nan]})
    assert not any(ax.child_axes for ax in axes)
    assert hatched(axes[0])


def test_the_band_reaches_to_the_largest_norm_of_each_stretch():
    norms = np.array([1.0, 2.0, 1.5])
    peaks = np.array([1.0, 9.0, 4.0])
    history = {
        "norm": norms,
        "peak/norm": peaks,
        "width": [4, 4, 4],
        "step": [2, 5, 11],
    }
    _, norm = drawn(history)
    corners = {tuple(x) for x in filled(norm, "largest")}
    assert {(5.0, 2.0), (5.0, 9.0), (11.0, 1.5), (11.0, 4.0)} <= corners


# As a record keeps them: stretches of 64 steps, of each one step, then the last steps.
STRETCHES = {
    "step": [21, 75, 128, 129, 130],
    "width": [64, 64, 1, 1, 1],
    "nonfinite": [0, 0, 0, 0, 0],
    "norm": [1.0, 2.0, 9.0, 9.0, 9.0],
    "peak/norm": [1.0, 50.0, 9.0, 9.0, 9.0],
    "clipped": [16, 64, 0, 1, 0],
}


def test_rows_of_a_record_lie_where_their_stretches_do_and_count_as_often():
    loss, norm = drawn(STRETCHES)
    assert norm.get_xlim() == (0, 130)
    (bars,) = [x.get_data() for x in norm.patches]
    assert list(bars.edges) == [0, 64, 128, 129, 130, 131]
    np.testing.assert_allclose(bars.values, 0.08 * np.array([0.25, 1, 0, 1, 0]))
    assert title(loss) == "Clipped at 62 % of the steps"
    unclipped = {k: x for k, x in STRETCHES.items() if k != "clipped"}
    message = "The gradient norm: 2 in the middle, 50 at most"
    assert title(drawn(unclipped)[0]) == message


def test_steps_that_a_record_counts_at_its_last_row_are_part_of_the_run():
    norms = [1.0, 2.0, 30.0, 500.0, np.inf]
    history = {"step": range(5), "width": [1, 1, 1, 1, 96], "norm": norms}
    loss, _ = drawn(history | {"nonfinite": [0, 0, 0, 0, 96]})
    assert hatched(loss) == [(4, 7)]
    assert "not finite from step 4 on (to step 99)" in texts(loss)


def test_rows_of_a_log_reach_back_to_the_row_before():
    norms = np.array([3.0, 1.0, 3.0])
    history = {"step": [10, 20, 30], "norm": norms, "clip/norm": norms}
    _, norm = drawn(history | {"clip/max_norm": np.full(3, 2.0)})
    (bars,) = [x.get_data() for x in norm.patches]
    assert list(bars.edges) == [1, 11, 21, 31]
    assert list(bars.values > 0) == [True, False, True]


def test_of_a_hundred_thousand_rows_a_thousand_are_drawn_and_no_peak_is_lost():
    norms = np.exp(RNG.normal(size=100_000))
    norms[70_123] = 3e4
    _, norm = drawn({"loss": RNG.normal(size=100_000), "norm": norms})
    assert len(norm.lines[0].get_xdata()) == 1000
    assert np.isin(norm.lines[0].get_ydata(), norms).all()
    top = filled(norm, "largest")
    x, y = top[np.argmax(top[:, 1])]
    assert y == 3e4
    assert abs(x - 70_123) <= 100


def test_rows_without_a_norm_leave_no_gap_but_those_that_are_not_finite_do():
    rows = [{"step": i, "loss": 1.0 + i, "grad_norm": 2.0} for i in range(9)]
    del rows[2]["grad_norm"]
    rows[5]["grad_norm"] = np.nan
    _, norm = drawn(oc.history(rows))
    steps, norms = norm.lines[0].get_data()
    assert list(steps) == [0, 1, 3, 4, 5, 6, 7, 8]
    assert list(steps[np.isnan(norms)]) == [5]


def test_a_single_step_that_is_not_finite_is_a_cross_at_the_top():
    norms = np.ones(50)
    norms[[7, 30]] = np.inf
    axes = drawn({"loss": np.ones(50), "norm": norms})
    ((steps, heights),) = lines(axes[1], marker="x")
    assert list(steps) == [7, 30]
    assert heights.min() > 0.9
    assert not hatched(axes[0])


def test_a_norm_of_zero_is_marked_at_the_bottom():
    _, norm = drawn({"norm": [1.0, 0.0, 2.0, 0.0]})
    ((steps, heights),) = lines(norm, marker="v")
    assert list(steps) == [1, 3]
    assert heights.max() < 0.2


def test_of_several_runs_the_last_is_black_and_those_before_are_grey():
    runs = np.repeat([0, 1, 2], 20)
    history = {"step": np.tile(np.arange(20), 3), "run": runs}
    history |= {"loss": 1.0 + runs, "norm": 5.0 + runs}
    loss, norm = drawn(history)
    for ax, first in ((loss, 1), (norm, 5)):
        ((_, last),) = lines(ax, color="black")
        assert set(last) == {first + 2}
        earlier = [set(y) for _, y in lines(ax, color="#8c8c8c")]
        assert earlier == [{first}, {first + 1}]
    assert title(loss).startswith("Run 3 of 3. ")


@pytest.mark.parametrize(
    ("losses", "scale"),
    [
        ([3.0, 2.5, 2.0], "linear"),
        ([300.0, 2.5, 2.0], "log"),
        ([300.0, 2.5, 0.0], "log"),
        ([-1.0, -50.0, -106.0], "linear"),
        ([-1.0, -1.0, -1.5, 1e9], "symlog"),
        ([0.0, 0.0], "linear"),
    ],
)
def test_the_axis_of_the_loss_is_log_where_its_range_and_sign_ask_for_it(losses, scale):
    loss, _ = drawn({"loss": losses})
    assert loss.get_yscale() == scale
    assert saved(loss)
    low, high = loss.get_ylim()
    assert all(low <= x <= high for x in losses if x or scale != "log")


@pytest.mark.parametrize("max_norm", [1e7, 1e-9], ids=["above", "below"])
def test_a_threshold_far_from_all_norms_is_named_and_leaves_them_their_room(max_norm):
    norms = np.array([1.0, 3.0, 2.0])
    history = {"norm": norms, "clip/norm": norms, "clip/max_norm": np.full(3, max_norm)}
    _, norm = drawn(history)
    (text,) = [x for x in texts(norm) if "clip at" in x]
    assert text.endswith("far above" if max_norm > 1 else "far below")
    low, high = norm.get_ylim()
    assert 0.1 < low < 1
    assert 3 < high < 10


def test_a_threshold_that_never_acted_is_said_to_be_one():
    norms = np.array([1.0, 3.0, 2.0])
    history = {"norm": norms, "clip/norm": norms, "clip/max_norm": np.full(3, 20.0)}
    loss, norm = drawn(history)
    assert title(loss) == "The clip never acted: the largest norm was 3"
    assert "clipped away" not in texts(norm)


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ({"step": [0, 1], "loss": [3.0, 2.0]}, "The loss: 3 at first, 2 at the end"),
        ({"norm": [3.0]}, "The gradient norm: 3 in the middle, 3 at most"),
        ({"loss": [3.0], "norm": [1.0]}, "The gradient norm: 1 in the middle, 1 at"),
        ({"loss": [np.nan] * 3, "norm": [np.nan] * 3}, "Not finite from step 0 on"),
    ],
    ids=["loss alone", "norm alone", "one row", "all NaN"],
)
def test_a_log_with_little_in_it_is_drawn_too(history, message):
    loss, norm = drawn(history)
    assert title(loss).startswith(message)
    assert message.split(":")[0] in saved(loss)
    for ax, name in ((loss, "loss"), (norm, "gradient norm")):
        column = history.get(name.split()[-1], [np.nan])
        is_empty = not np.isfinite(column).any()
        assert (f"no finite {name} in this record" in texts(ax)) == is_empty


def test_no_style_is_left_behind():
    before = dict(matplotlib.rcParams)
    oc.plot.run(small_runs.dead())
    assert dict(matplotlib.rcParams) == before
    assert len(pyplot.get_fignums()) == 1


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r'pip install "optaxclip\[looking\]"'):
        oc.plot.run({"loss": [1.0]})
