"""The handwriting study runs, and reads real handwriting when there is some."""

import importlib
from pathlib import Path

import numpy as np
import pytest

STUDIES = Path(__file__).parents[2] / "benchmarks" / "studies"


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STUDIES))
        yield importlib.import_module("lstm_handwriting")


def xml_line(points):
    inner = "".join(f'<Point x="{x}" y="{y}" time="{i}"/>' for i, (x, y) in points)
    return (
        '<?xml version="1.0" encoding="ISO-8859-1"?><WhiteboardCaptureSession>'
        f"<StrokeSet><Stroke>{inner}</Stroke></StrokeSet></WhiteboardCaptureSession>"
    )


@pytest.fixture
def strokes(tmp_path):
    """Two lines in the format of IAM-OnDB, one of them too short to be used."""
    folder = tmp_path / "lineStrokes" / "a01" / "a01-000"
    folder.mkdir(parents=True)
    long = enumerate((5 * i, (7 * i) % 11) for i in range(130))
    (folder / "a01-000u-01.xml").write_text(xml_line(long))
    (folder / "a01-000u-02.xml").write_text(xml_line(enumerate([(0, 0), (1, 2)])))
    return tmp_path / "lineStrokes"


def test_the_quick_mode_blows_up_without_a_clip_and_learns_with_one(
    example, tmp_path, capsys
):
    history = example.main(["--quick", "--steps", "25", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert example.blown_up(history.final[0]).all()
    assert not example.blown_up(history.final[1:]).any()
    assert (history.final[1:4] < history.final[4]).all()  # the small learning rate
    # Nothing is clipped before the first gradient is measured, but what comes back.
    np.testing.assert_allclose(history.norm[:3, :, 0] - history.norm[0, :, 0], 0)
    assert "Graves' ranges" in printed and "cell/*" in printed
    for name in ("loss", "norms", "strokes"):
        path = tmp_path / f"handwriting_{name}.png"
        assert path.stat().st_size > 10_000
        assert f"\n  {path}\n" in printed


def test_the_folder_of_the_data_base_is_read(example, strokes):
    (line,) = example.load_strokes(strokes)
    points = np.array([(5 * i, -((7 * i) % 11)) for i in range(130)])
    offsets = np.diff(points, axis=0)
    np.testing.assert_allclose(line, offsets / offsets.std(), rtol=1e-6)
    windows = example.cut_windows([line], np.random.default_rng(0), 4)
    assert windows.shape == (4, example.TIME_STEPS + 1, 2)


def test_a_file_of_offsets_is_read(example, tmp_path):
    draw = np.random.default_rng(0)
    lines = {"a": draw.normal(size=(150, 3)), "b": draw.normal(size=(20, 3))}
    np.savez(tmp_path / "some.npz", a=lines["a"], b=lines["b"])
    (line,) = example.load_strokes(tmp_path / "some.npz")
    np.testing.assert_allclose(
        line, lines["a"][:, :2] / lines["a"][:, :2].std(), rtol=1e-6
    )
    np.savez(tmp_path / "flat.npz", a=np.zeros(300))
    with pytest.raises(ValueError, match=r"shape \[points, 2\] in .*got \(300,\)"):
        example.load_strokes(tmp_path / "flat.npz")


def test_options_that_name_no_handwriting_say_where_to_get_it(
    example, tmp_path, capsys
):
    (tmp_path / "empty").mkdir()
    for path, came in (
        (tmp_path / "missing", "expected a folder of XML files or an .npz file, got"),
        (tmp_path / "empty", "got 0 lines, none as long"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            example.main(["--strokes", str(path)])
        assert exit_info.value.code == 2
        error = capsys.readouterr().err
        assert came in error and "University of Bern" in error


def test_broken_handwriting_is_an_error_of_the_option(example, strokes, capsys):
    next(strokes.rglob("*01.xml")).write_text("<not closed")
    with pytest.raises(SystemExit):
        example.main(["--strokes", str(strokes)])
    assert "argument --strokes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--seeds", "0", "expected a whole number >= 1, got '0'"),
        ("--steps", "many", "expected a whole number >= 1, got 'many'"),
        ("--learning-rate", "-1", "expected a number > 0, got '-1'"),
        ("--out", __file__, "expected a folder to write to"),
    ],
)
def test_bad_options_say_what_was_expected(example, capsys, option, value, message):
    with pytest.raises(SystemExit) as exit_info:
        example.main([f"{option}={value}"])
    assert exit_info.value.code == 2
    assert f"argument {option}: {message}" in capsys.readouterr().err
