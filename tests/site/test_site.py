"""The site is whole: it builds, names everything, and any reader can use its pages."""

import functools
import http.server
import inspect
import pathlib
import re
import subprocess
import sys
import threading

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

from helpers import oc, which_browser
from optaxclip import factors, norms, plot, thresholds

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
# What the people who come ask for, and where they find it.
SEARCHES = {
    "clipnorm": "coming_from_keras",
    "clipvalue": "coming_from_keras",
    "clip_grad_norm_": "coming_from_pytorch",
    "clip_grad_value_": "coming_from_pytorch",
    "Graves": "exploding_gradients",
    "watch the norms": "exploding_gradients",
    "loss is NaN": "loss_is_nan",
    "checkpoint": "checkpoints",
    "clip_by_global_norm": "reference/clips",
    "float16": "mixed_precision",
}

AXE = {"resultTypes": ["violations"], "preload": False}  # no style sheet once more
# Colors are those of the theme: looked at on a page of each kind, for it takes long.
COLORFUL = ("index", "rules", "start", "reference/norms", "gallery/own_rule", "search")

thorough = pytest.mark.thorough


def test_every_public_name_is_in_the_reference_once():
    text = "\n".join(x.read_text() for x in (DOCS / "reference").glob("*.md"))
    listed = []
    for block in re.findall(r"currentmodule:: (\S+)\n(.*?)```", text, re.DOTALL):
        names = re.findall(r"auto(?:function|class):: (\w+)", block[1])
        listed += [f"{block[0]}.{name}" for name in names]
    public = {
        f"{module.__name__}.{name}"
        for module in (oc, norms, thresholds, factors, plot)
        for name, value in vars(module).items()
        if callable(value) and value.__module__.startswith("optaxclip")
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert sorted(listed) == sorted(public)


def test_the_figures_of_the_gallery_are_of_the_lessons_as_they_are():
    code = "import figures; print(*figures.stale())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=DOCS, capture_output=True, text=True
    )
    assert not done.stdout.split() and not done.returncode, (
        f"Run `python docs/figures.py`: {done.stdout}{done.stderr}"
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Builds it, where a warning is a failure."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-j", "2"]
    done = subprocess.run([*command, DOCS, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def address(site):
    """Serves it."""
    handler = functools.partial(Silent, directory=site)
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}"
        server.shutdown()


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=which_browser(), args=["--no-sandbox"]
        )
        yield launched
        launched.close()


def pages(site):
    found = sorted(str(path.relative_to(site)) for path in site.rglob("*.html"))
    return [page for page in found if not page.startswith("_static")]


@thorough
@pytest.mark.parametrize("width, scheme", [(400, "dark"), (1400, "light")])
def test_every_page_can_be_read_at(width, scheme, site, address, browser):
    page = browser.new_page(
        viewport={"width": width, "height": 900}, color_scheme=scheme
    )
    complaints = []
    page.on("console", lambda x: x.type in ("error", "warning") and complain(x.text))
    page.on("pageerror", lambda x: complain(str(x)))
    page.on("response", lambda x: x.status >= 400 and complain(x.url))
    page.on("request", lambda x: x.url.startswith(address) or complain(x.url))

    def complain(text):
        complaints.append(f"{name}: {text}")

    for name in pages(site):
        page.goto(f"{address}/{name}")
        if (wide := page.evaluate("document.documentElement.scrollWidth")) > width:
            complain(f"{wide} pixels wide")
        colors = {"color-contrast": {"enabled": name.removesuffix(".html") in COLORFUL}}
        found = Axe().run(page, options=AXE | {"rules": colors})
        for violation in found.response["violations"]:
            if violation["impact"] in ("serious", "critical"):
                nodes = [node["html"] for node in violation["nodes"]]
                complain(f"{violation['help']}: {nodes[:3]}")
    page.close()
    assert not complaints, "\n".join(complaints)


@thorough
@pytest.mark.parametrize("words", SEARCHES)
def test_the_search_finds(words, address, browser):
    page = browser.new_page()
    page.goto(f"{address}/search.html?q={words.replace(' ', '+')}")
    page.wait_for_selector("#search-results ul.search li a")
    page.wait_for_function("document.querySelector('.search-summary').innerText != ''")
    links = page.eval_on_selector_all(
        "#search-results ul.search li a", "all => all.map(x => x.getAttribute('href'))"
    )
    page.close()
    assert any(link.startswith(SEARCHES[words]) for link in links[:8]), links
