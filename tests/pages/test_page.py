"""What stands on the page of `report`: valid, small, searchable, self-contained."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

import small_runs
from helpers import oc

RNG = np.random.default_rng(0)


def written(history, tmp_path):
    path = tmp_path / "report.html"
    oc.report(history, path)
    return path.read_text(encoding="utf-8")


def parsed(text):
    """The page as a tree: it is XML too, so that every tag is closed and nested."""
    start = "<!DOCTYPE html>\n"
    assert text.startswith(start)
    return ElementTree.fromstring(text.removeprefix(start))


def words(node):
    return " ".join("".join(node.itertext()).split())


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return parsed(written(small_runs.dead(), tmp_path_factory.mktemp("page")))


def test_the_verdicts_are_on_top_worst_first_and_faults_are_marked(page):
    verdicts = oc.diagnose(small_runs.dead())
    items = page.findall(".//ol/li")
    assert page.find("body/main")[1] is page.find(".//ol")
    for (name, text), item in zip(verdicts.items(), items, strict=True):
        assert words(item).replace("`", "") == f"{name}{text}".replace("`", "")
        assert item.get("class") == "bad"
    assert words(page.find(".//h1")).lower() == ", ".join(verdicts)


def test_what_is_no_fault_is_not_marked_as_one(tmp_path):
    page = parsed(written(small_runs.good(), tmp_path))
    assert [x.get("class") for x in page.findall(".//ol/li")] == [None, None]
    assert words(page.find(".//h1")) == "Always clipped, healthy"


def test_the_table_has_a_row_for_each_leaf_with_its_numbers(page):
    history = small_runs.dead()
    rows = {
        words(row[0]): [*map(words, row[1:])] for row in page.findall(".//tbody/tr")
    }
    norms = {k[5:]: x for k, x in history.items() if k.startswith("norm/")}
    assert [*rows] == [*norms]
    recent = np.stack([x[-64:] for x in norms.values()]) ** 2
    shares = np.median(recent / recent.sum(axis=0), axis=1)
    for (path, cells), share in zip(rows.items(), shares, strict=True):
        x = norms[path]
        numbers = [float(cell) for cell in cells[:3]]
        assert numbers == pytest.approx([x[-1], np.median(x), x.max()], rel=5e-3)
        assert cells[3] == f"{100 * share:.0f} %"
        since = np.flatnonzero(x)[-1] + 1
        assert cells[4] == (f"dead since {since}" if since < 640 else "")


def test_the_run_in_numbers(page):
    history = small_runs.dead()
    names = [words(x) for x in page.findall(".//dt")]
    facts = dict(zip(names, map(words, page.findall(".//dd")), strict=True))
    assert facts["steps"] == "640, last 639"
    assert facts["threshold"] == "600"
    assert facts["clipped"] == f"{100 * history['clipped'].mean():.0f} % of the steps"
    assert float(facts["lowest loss"]) == pytest.approx(history["loss"].min(), rel=5e-3)


def test_the_pictures_are_inline_with_text_that_can_be_searched(page):
    pictures = page.findall(".//figure/svg")
    assert len(pictures) == 3
    for picture in pictures:
        assert picture.get("role") == "img"
        assert picture.get("viewBox")
    labels = [picture.get("aria-label") for picture in pictures]
    share = f"{100 * small_runs.dead()['clipped'].mean():.0f} %"
    start = f"Loss and gradient norm by step. Clipped at {share} of"
    assert labels[0].startswith(start)
    texts = [words(x) for x in page.findall(".//text")]
    since = np.flatnonzero(small_runs.dead()["norm/dense_0/kernel"])[-1] + 1
    assert {"clip at 600", f"exactly 0 from step {since} on"} <= set(texts)
    assert "dense_1/kernel" in texts


def test_ids_are_unique_and_each_reference_finds_one(page):
    ids = [x.get("id") for x in page.iter() if x.get("id")]
    assert len(ids) == len(set(ids)) > 100
    values = [value for x in page.iter() for value in x.attrib.values()]
    links = [x.get("href") for x in page.iter("use")]
    used = {link.removeprefix("#") for link in links}
    used |= {name for value in values for name in re.findall(r"url\(#(.+?)\)", value)}
    assert len(used) > 10
    assert used <= set(ids)


def test_it_asks_nothing_of_the_network_and_has_no_script(tmp_path):
    text = written(small_runs.dead(), tmp_path)
    page = parsed(text)
    assert "http" not in re.sub(r'"data:image/png;base64[^"]+"', "", text)
    assert not re.search(r"@import|url\((?!#)", text)
    assert not [x for x in page.iter() if x.tag in ("script", "link", "iframe", "img")]
    for image in page.iter("image"):
        assert image.get("href", "").startswith("data:image/png;base64,")


def test_the_same_history_makes_the_same_page(tmp_path):
    history = {"loss": [3.0, 2.0, 1.0], "norm": [9.0, 2.0, 1.0], "norm/w": [9.0, 2, 1]}
    assert written(history, tmp_path) == written(history, tmp_path)


def test_a_long_run_of_many_leaves_stays_under_a_megabyte(tmp_path):
    rows = 768
    history = {
        f"norm/block_{i}/kernel": np.exp(RNG.normal(size=rows)) for i in range(600)
    }
    history |= {"loss": np.exp(RNG.normal(size=rows))}
    text = written(history, tmp_path)
    assert len(text.encode()) < 1_000_000
    page = parsed(text)
    assert words(page.find(".//caption")).startswith("8 of 600: ")
    assert len(page.findall(".//details//tbody/tr")) == 600


def test_a_path_is_text_whatever_is_in_it(tmp_path):
    path = '<b "x">&amp; `$1$` id="'
    history = {f"norm/{path}": [*[1.0] * 10, *[0.0] * 10], "norm/w": np.ones(20)}
    page = parsed(written(history, tmp_path))
    assert words(page.find(".//tbody/tr/td")) == path
    assert path in [x.text for x in page.iter("text")]
    assert path.replace("`", "") in words(page.find(".//ol"))


def test_of_a_log_without_norms_there_is_the_loss_alone(tmp_path):
    page = parsed(written({"loss": [3.0, 2.0, 1.0]}, tmp_path))
    assert len(page.findall(".//svg")) == 1
    assert page.find(".//table") is None


def test_each_of_several_runs_is_judged_in_a_line_of_its_own(tmp_path):
    norms = np.tile([1.0, 1.0, 1.0, 30.0, 1e3, 1e6, np.nan], 2)
    history = {"step": np.tile(np.arange(7), 2), "run": np.repeat([0, 1], 7)}
    page = parsed(written(history | {"norm": norms}, tmp_path))
    assert len(page.findall(".//ol/li/br")) == 1
    assert words(page.find(".//ol/li")).count("EXPLODED") == 2


def test_it_takes_the_path_of_a_log_too(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text("step,loss,grad_norm\n0,3,1\n1,2,1\n2,1,1\n", encoding="utf-8")
    assert "3, last 2" in [words(x) for x in parsed(written(log, tmp_path)).iter("dd")]
