"""What `plot.layers` draws of the norms of leaves."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb

import small_runs
from drawn import lines, new, saved, texts, title
from helpers import oc

RNG = np.random.default_rng(0)


def drawn(history):
    return oc.plot.layers(history, new())


def leaves(history):
    return {k: x for k, x in history.items() if k.startswith("norm/")}


def colours(ax):
    """The colour of each cell, `[leaves, columns, 4]`."""
    (image,) = [x for x in ax.collections if hasattr(x, "get_coordinates")]
    return image.cmap(image.norm(image.get_array())), image


def test_each_leaf_is_a_row_of_its_norms_over_its_median():
    history = {name: x[:300] for name, x in small_runs.good().items()}
    ax = drawn(history)
    _, image = colours(ax)
    values = np.stack([*leaves(history).values()])
    expected = np.log10(values / np.median(values, axis=1, keepdims=True))
    shown = np.clip(expected, image.norm.vmin, image.norm.vmax)
    np.testing.assert_allclose(image.get_array(), shown, atol=1e-12)
    names = [x.get_text() for x in ax.get_yticklabels()]
    assert names == [name.removeprefix("norm/") for name in leaves(history)]
    assert ax.get_ylim() == (len(names) - 0.5, -0.5)


def test_darker_is_above_the_median_in_grey_too():
    values = np.array([1e-3, 1e-2, 1e-1, 1, 1, 1, 1e1, 1e2, 1e3])
    shades, _ = colours(drawn({"norm/w": values}))
    grey = shades[0, :, :3] @ [0.299, 0.587, 0.114]
    assert (np.diff(grey) <= 0).all()
    assert grey[0] - grey[3] > 0.2
    assert grey[3] - grey[-1] > 0.2


def test_a_dead_leaf_is_a_black_row_with_the_step_in_words():
    history = small_runs.dead()
    gone = [name for name, x in leaves(history).items() if (x[-10:] == 0).all()]
    since = max(np.flatnonzero(history[name])[-1] + 1 for name in gone)
    ax = drawn(history)
    message = f"exactly 0 from step {since} on"
    assert title(ax) == f"{len(gone)} of 6 leaves: {message}"
    assert texts(ax).count(message) == 2  # one on each side of the leaf that lives
    shades, _ = colours(ax)
    black = (shades[:, -1, :3] == to_rgb("black")).all(axis=-1)
    assert list(black) == [name in gone for name in leaves(history)]


@pytest.mark.parametrize(("zeros", "is_named"), [(24, False), (25, True)])
def test_a_leaf_is_called_dead_after_a_quarter_of_the_rows(zeros, is_named):
    norms = np.where(np.arange(100) < 100 - zeros, 1.0, 0.0)
    ax = drawn({"norm/a": norms, "norm/b": np.ones(100)})
    assert ("exactly 0 from step 75 on" in texts(ax)) == is_named


def test_what_is_not_finite_is_white_with_crosses_and_no_zero_after_it_is_black():
    history = small_runs.exploding()
    first = int(np.argmax(history["nonfinite"]))
    assert any((x[first:] == 0).any() for x in leaves(history).values())
    ax = drawn(history)
    shades, _ = colours(ax)
    assert (shades[:, first:, :3] == 1).all()
    (cross,) = lines(ax, marker="x")
    steps, rows = cross
    assert set(rows) == set(range(6))
    assert steps.min() >= first
    assert title(ax) == f"Not finite from step {first} on"
    assert ax.get_xlim() == (0, 2 * first)


def test_rows_of_a_record_are_as_wide_as_their_stretches_and_count_as_often():
    columns = {"step": [21, 75, 128, 129], "width": [64, 64, 1, 1]}
    columns["nonfinite"] = [0, 0, 0, 0]
    ax = drawn(columns | {"norm/w": [1.0, 2.0, 9.0, 9.0]})
    _, image = colours(ax)
    edges = image.get_coordinates()[0, :, 0]
    assert list(edges) == [0, 64, 128, 129, 130]
    assert ax.child_axes[0].patches[0].get_width() == 2
    assert title(ax) == "At most 4.5 times the median of a leaf, at step 128"


def test_steps_that_are_not_finite_do_not_count_in_the_median():
    columns = {"step": [0, 1, 2, 3], "width": [1, 1, 1, 97], "nonfinite": [0, 0, 0, 97]}
    columns |= {"norm": [2, 2, 2, np.inf], "norm/a": [1.0, 3, 5, 1e9]}
    (bars,) = drawn(columns | {"norm/b": [1.0, 1, 1, np.inf]}).child_axes
    assert [bar.get_width() for bar in bars.patches] == [3, 1]


def test_one_leaf_that_is_not_finite_is_crossed_alone():
    norms = np.ones(8)
    bad = np.where(np.arange(8) == 5, np.nan, 1.0)
    ax = drawn({"norm/a": norms, "norm/b": bad, "norm/c": norms})
    np.testing.assert_array_equal(lines(ax, marker="x"), [[[5.5], [1]]])


def test_the_bars_are_the_medians_of_the_leaves():
    history = small_runs.good()
    (bars,) = drawn(history).child_axes
    widths = [bar.get_width() for bar in bars.patches]
    expected = [np.median(x) for x in leaves(history).values()]
    np.testing.assert_allclose(widths, expected)
    assert bars.get_xscale() == "log"


@pytest.mark.parametrize("count", [1, 40, 41, 250])
def test_of_many_leaves_as_many_are_named_as_can_be_read(count):
    paths = [f"blocks/{i}/attention/query/kernel" for i in range(count)]
    ax = drawn({f"norm/{x}": np.ones(3) for x in paths})
    names = [x.get_text() for x in ax.get_yticklabels()]
    assert min(count, 20) <= len(names) <= 40
    for row, name in zip(ax.get_yticks(), names, strict=True):
        assert paths[int(row)].endswith(name.removeprefix("…"))
        assert len(name) <= 28


def test_a_path_is_no_formula_and_no_tag():
    name = '<$a_1$&"q">'
    text = saved(drawn({f"norm/{name}": np.ones(3)}))
    assert "&lt;$a_1$&amp;" in text


def test_without_norms_of_leaves_it_says_what_keeps_them():
    with pytest.raises(ValueError, match=r"`norm/<path>`, got step, .*record. keeps"):
        oc.plot.layers({"norm": [1.0]})


def test_the_largest_of_all_is_said_where_nothing_is_wrong():
    ax = drawn({"norm/a": [1.0, 1.0, 5.0], "norm/b": [2.0, 2.0, 2.0]})
    assert title(ax) == "At most 5 times the median of a leaf, at step 2"


def test_without_axes_it_opens_a_figure_as_high_as_the_leaves_need():
    few = oc.plot.layers({"norm/a": [1.0]})
    many = oc.plot.layers({f"norm/{i}": [1.0] for i in range(30)})
    assert few.figure.get_figheight() < many.figure.get_figheight() < 9
