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
    "page", [x for x in PAGES if x.stem != "logging"], ids=lambda page: page.stem
)


@every_page_that_prints
def test_a_page_prints_what_it_says(page, capsys):
    names = {}
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    assert blocks
    for code, _ in blocks:
        exec(compile(code, page.name, "exec"), names)
    assert capsys.readouterr().out == "".join(output for _, output in blocks)


@every_page
def test_a_page_names_only_files_that_exist(page):
    links = re.findall(r"\]\(([^):]+)\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert links and not missing
