"""The page of `report` in a real browser, as wide as a phone and as a screen."""

import html
import re
import subprocess

import numpy as np
import pytest
from matplotlib.image import imread

import small_runs
from helpers import oc, which_browser

pytestmark = pytest.mark.thorough

QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
    *("--no-first-run", "--disable-background-networking", "--hide-scrollbars"),
    *("--disable-component-update", "--disable-sync", "--enable-logging=stderr"),
)
DARK = "--blink-settings=preferredColorScheme=0"
LOOK = """<script>
const sizes = [...document.querySelectorAll("svg text")].map(
  x => x.getBoundingClientRect().height);
const images = [...document.querySelectorAll("figure svg")].map(
  x => x.getBoundingClientRect().height);
parent.document.title = JSON.stringify({
  wide: document.documentElement.scrollWidth, smallest: Math.min(...sizes),
  pictures: images.filter(x => x > 100).length,
  asked: performance.getEntriesByType("resource").length});
</script></body>"""


def opened(path, tmp_path, width, *options):
    """Opens a page; returns what it printed, and what the browser complained of."""
    profile = f"--user-data-dir={tmp_path / f'profile {width}'}"
    size = f"--window-size={width},2200"
    done = subprocess.run(
        [which_browser(), *QUIET, profile, size, *options, path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, re.findall(r".*CONSOLE.*", done.stderr)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report with what is hard: dead leaves, long paths with signs in them."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    history = dict(small_runs.dead())
    name = "encoder/" + "block/" * 8 + '<&"$x$>kernel'
    oc.report(history | {f"norm/{name}": np.ones(640)}, path)
    return path


@pytest.mark.parametrize("width", [400, 1400])
def test_it_fits_and_its_text_can_be_read_at(width, report, tmp_path):
    path = tmp_path / "looked.html"  # in a frame: no window is as narrow as a phone
    text = report.read_text(encoding="utf-8").replace("</body>", LOOK)
    frame = f'<iframe width="{width}" height="2000" srcdoc="{html.escape(text)}">'
    path.write_text(f"<!DOCTYPE html><title></title>{frame}", encoding="utf-8")
    page, complaints = opened(path, tmp_path, width, "--dump-dom")
    assert not complaints
    found = re.search(
        r'<title>{"wide":(\d+),"smallest":([\d.]+),"pictures":(\d),"asked":(\d+)}', page
    )
    assert found
    wide, smallest, pictures, asked = map(float, found.groups())
    assert wide <= width
    assert smallest >= 9  # pixels, with the room above and below the letters
    assert pictures == 3
    assert asked == 0


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
def test_it_is_drawn_in_light_and_in_dark_at(width, is_dark, report, tmp_path):
    shot = tmp_path / "shot.png"
    options = [f"--screenshot={shot}", *([DARK] if is_dark else [])]
    _, complaints = opened(report, tmp_path, width, *options)
    assert not complaints
    grey = imread(shot)[..., :3].mean(axis=-1)
    assert grey.shape == (2200, width)
    paper, ink = (0, 1) if is_dark else (1, 0)
    assert np.median(grey) == paper
    assert abs(grey - ink).min() < 0.1
    figures = abs(grey[400:1500] - paper) > 0.5  # the pictures are there, and seen
    assert 0.005 < figures.mean() < 0.5
