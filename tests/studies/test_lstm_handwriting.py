"""The handwriting study runs, and reads real handwriting when there is some."""

import numpy as np
import pytest

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def handwriting(study):
    return study("lstm_handwriting")


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
    handwriting, run_study
):
    history, printed, folder = run_study("lstm_handwriting", "--quick", "--steps", "20")
    assert handwriting.blown_up(history.final[0]).all()
    assert not handwriting.blown_up(history.final[1:]).any()
    assert (history.final[1:4] < history.final[4]).all()  # the small learning rate
    # Nothing is clipped before the first gradient is measured, but what comes back.
    np.testing.assert_allclose(history.norm[:3, :, 0] - history.norm[0, :, 0], 0)
    lines = printed.splitlines()
    for name, lost in zip(handwriting.SETTINGS, (2, 0, 0, 0, 0), strict=True):
        assert any(x.startswith(name) and f"{lost} of 2" in x for x in lines)
    path = folder / "handwriting.png"
    assert path.stat().st_size > 10_000
    assert f"\n  {path}\n" in printed


def test_a_run_that_falls_back_is_lost_still(handwriting):
    loss = np.array([[1.0, 2000.0, 3.0], [1.0, 2.0, np.nan], [1.0, 2.0, 3.0]])
    kept = handwriting.until_lost(10 * loss, loss)
    np.testing.assert_array_equal(
        kept, [[10, np.nan, np.nan], [10, 20, np.nan], [10, 20, 30]]
    )


def test_the_folder_of_the_data_base_is_read(handwriting, strokes):
    (line,) = handwriting.load_strokes(strokes)
    points = np.array([(5 * i, -((7 * i) % 11)) for i in range(130)])
    offsets = np.diff(points, axis=0)
    np.testing.assert_allclose(line, offsets / offsets.std(), rtol=1e-6)
    windows = handwriting.cut_windows([line], np.random.default_rng(0), 4)
    assert windows.shape == (4, handwriting.TIME_STEPS + 1, 2)


def test_a_file_of_offsets_is_read(handwriting, tmp_path):
    draw = np.random.default_rng(0)
    lines = {"a": draw.normal(size=(150, 3)), "b": draw.normal(size=(20, 3))}
    np.savez(tmp_path / "some.npz", a=lines["a"], b=lines["b"])
    (line,) = handwriting.load_strokes(tmp_path / "some.npz")
    np.testing.assert_allclose(
        line, lines["a"][:, :2] / lines["a"][:, :2].std(), rtol=1e-6
    )
    np.savez(tmp_path / "flat.npz", a=np.zeros(300))
    with pytest.raises(ValueError, match=r"shape \[points, 2\] in .*got \(300,\)"):
        handwriting.load_strokes(tmp_path / "flat.npz")


def test_options_that_name_no_handwriting_say_where_to_get_it(
    handwriting, tmp_path, capsys
):
    (tmp_path / "empty").mkdir()
    for path, came in (
        (tmp_path / "missing", "expected a folder of XML files or an .npz file, got"),
        (tmp_path / "empty", "got 0 lines, none as long"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            handwriting.main(["--strokes", str(path)])
        assert exit_info.value.code == 2
        error = capsys.readouterr().err
        assert came in error and "University of Bern" in error


def test_broken_handwriting_is_an_error_of_the_option(handwriting, strokes, capsys):
    next(strokes.rglob("*01.xml")).write_text("<not closed")
    with pytest.raises(SystemExit):
        handwriting.main(["--strokes", str(strokes)])
    assert "argument --strokes" in capsys.readouterr().err
