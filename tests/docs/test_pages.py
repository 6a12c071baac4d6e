"""The snippets of the README and of the docs run in order and print what is there."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```python\n(.*?)```(?:\n+```text\n(.*?)```)?", re.DOTALL)

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
# That one writes logs, which test_logging.py reads.
every_page_that_prints = pytest.mark.parametrize(
    "page",
    [x for x in PAGES if "```python" in x.read_text() and x.stem != "logging"],
    ids=lambda page: page.stem,
)


@every_page_that_prints
def test_a_page_prints_what_it_says(page, capsys):
    names = {}
    for code, _ in blocks(page):
        exec(compile(code, page.name, "exec"), names)
    printed = capsys.readouterr().out
    assert printed == "".join(output for _, output in blocks(page))


@every_page
def test_no_code_of_a_page_is_passed_over(page):
    fences = page.read_text(encoding="utf-8").count("```python")
    assert len(blocks(page)) == fences


@every_page
def test_a_page_names_only_files_that_exist(page):
    links = re.findall(r"\]\(([^):#]+)[)#]", page.read_text(encoding="utf-8"))
    assert not [link for link in links if not source(page.parent / link).exists()]


def source(path):
    """Gives what a page of the gallery is made of, when the site is built."""
    made = path.parent == ROOT / "docs" / "gallery" and path.stem != "index"
    return ROOT / "examples" / f"{path.stem}.py" if made else path


def blocks(page):
    """Gives the snippets of a page, and what it says that they print."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))
