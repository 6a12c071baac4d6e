"""What the studies share: options, quartiles, tables, and marks in figures."""

import numpy as np
import pytest

FULL = {"seeds": 16, "steps": 300}
QUICK = {"seeds": 2, "lengths": [10, 50]}


@pytest.fixture
def helpers(study):
    return study("_study")


@pytest.fixture
def read(helpers, tmp_path):
    """Reads options as a study does."""

    def read(*arguments):
        parser = helpers.option_parser("Trains.", FULL, QUICK)
        parser.add_argument("--lengths", type=int, nargs="+", default=[100])
        parser.add_argument("--rate", type=helpers.positive_number, default=0.1)
        out = [] if "--out" in arguments else ["--out", str(tmp_path / "new" / "one")]
        return helpers.parse_options(parser, [*arguments, *out], QUICK)

    return read


def test_quick_changes_the_defaults_and_no_option_that_is_given(read):
    assert (read().seeds, read().steps, read().lengths) == (16, 300, [100])
    options = read("--quick", "--lengths", "7")
    assert (options.seeds, options.steps, options.lengths) == (2, 300, [7])
    assert read("--quick").lengths == [10, 50]
    assert options.out.is_dir()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--seeds", "0", "expected a whole number >= 1, got '0'"),
        ("--seeds", "-3", "expected a whole number >= 1, got '-3'"),
        ("--steps", "ten", "expected a whole number >= 1, got 'ten'"),
        ("--rate", "0", "expected a number > 0, got '0'"),
        ("--rate", "nan", "expected a number > 0, got 'nan'"),
        ("--rate", "inf", "expected a number > 0, got 'inf'"),
        ("--rate", "fast", "expected a number > 0, got 'fast'"),
        ("--out", __file__, "expected a folder to write to"),
    ],
)
def test_bad_options_say_what_was_expected(read, capsys, option, value, message):
    with pytest.raises(SystemExit) as exit_info:
        read(option, value)
    assert exit_info.value.code == 2
    assert f"argument {option}: {message}" in capsys.readouterr().err


def test_no_bar_guesses_the_time_left_while_it_compiles(helpers, capsys):
    with helpers.progress_bar(total=1200, unit="steps", mininterval=0) as bar:
        bar.update(1)
    lines = capsys.readouterr().err.replace("\r", "\n").split()
    assert "compiling" in lines and "1/1200" in lines
    assert all("<" not in line and "/s" not in line for line in lines)


def test_what_is_not_finite_is_the_worst(helpers):
    runs = np.array([3.0, np.nan, 1.0, 2.0, np.inf])
    np.testing.assert_array_equal(helpers.quartiles(runs), [2.0, 3.0, np.inf])
    np.testing.assert_array_equal(helpers.quartiles([1.0, 2.0, np.inf])[:2], [1.5, 2.0])
    assert helpers.three_quartiles(runs) == "2 / 3 / inf"
    curves = np.array([[1.0, np.nan], [3.0, 5.0], [2.0, 4.0]])
    np.testing.assert_array_equal(helpers.median(curves, axis=0), [2.0, 5.0])
    np.testing.assert_array_equal(helpers.median(curves, axis=1), [np.inf, 4.0, 3.0])
    assert helpers.last_finite(curves).tolist() == [0, 1, 1]
    assert helpers.last_finite(np.full((1, 3), np.nan)).tolist() == [-1]


def test_numbers_are_short(helpers):
    values = (0.123456, 99.96, 123.4, 123456.0, np.nan)
    assert [helpers.short(x) for x in values] == ["0.123", "100", "123", "1e+05", "inf"]


def test_a_table_is_aligned_under_heads_of_several_lines(helpers, capsys):
    helpers.print_table(
        ["setting", "runs\nlost", QUARTILES := "25 % / median"],
        [["no clip", "16 of 16", "inf"], ["a long name of a clip", 0, "1 / 2"]],
    )
    assert capsys.readouterr().out.splitlines() == [
        f"{'':21}  {'runs':>8}",
        f"{'setting':21}  {'lost':>8}  {QUARTILES}",
        f"{'no clip':21}  16 of 16  {'inf':>13}",
        f"{'a long name of a clip':21}  {'0':>8}  {'1 / 2':>13}",
    ]


def test_a_run_is_drawn_up_to_its_last_finite_value_and_crossed_there(study):
    figures = study("_figures")
    _, axes = figures.new_figure(1, 1, (4, 3))
    runs = np.array([[1.0, 2.0, np.nan, 4.0], [1.0, 2.0, 3.0, 4.0], [np.nan] * 4])
    figures.plot_runs(axes[0, 0], runs, figures.STYLES[0], "no clip")
    crosses = [line for line in axes[0, 0].lines if line.get_marker() == "x"]
    (cross,) = (line.get_xydata().tolist() for line in crosses)
    assert cross == [[2.0, 2.0]]
    drawn = [line.get_ydata() for line in axes[0, 0].lines if line not in crosses]
    assert [len(y) for y in drawn] == [2, 4, 0]
    assert len(axes[0, 0].get_legend_handles_labels()[1]) == 1


def test_styles_differ_in_grey(study):
    styles = study("_figures").STYLES
    assert len({str(style["linestyle"]) for style in styles}) == len(styles)
