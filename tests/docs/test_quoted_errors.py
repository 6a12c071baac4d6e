"""What the docs quote of an error is in a message of the package."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
# The rows of a table whose first column has one of these titles.
TABLE = re.compile(r"^\| it (?:begins with|says) \|.*\n.*\n((?:\|.*\n)+)", re.MULTILINE)


def quotations():
    """Gives pairs: a page, what it quotes in the first column of a table of errors."""
    found = []
    for page in sorted((ROOT / "docs").glob("*.md")):
        for rows in TABLE.findall(page.read_text(encoding="utf-8")):
            quoted = re.findall(r"^\| `([^`]+)`", rows, re.MULTILINE)
            found += [(page.stem, text) for text in quoted]
    return found


def text_of(node):
    """Gives the text of a string without what is filled in, "" for what is none."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    texts = [part.value for part in parts if isinstance(part, ast.Constant)]
    return "".join(text for text in texts if isinstance(text, str))


@pytest.fixture(scope="module")
def texts():
    """All texts of the package, messages among them."""
    paths = sorted((ROOT / "optaxclip").rglob("*.py"))
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    return [text_of(node) for tree in trees for node in ast.walk(tree)]


@pytest.mark.parametrize(("page", "quoted"), quotations())
def test_a_quoted_error_is_one_of_the_package(texts, page, quoted):
    assert any(quoted in text for text in texts)


def test_errors_are_quoted_where_there_are_tables_of_them():
    assert {"many_devices", "scanned_layers"} <= {page for page, _ in quotations()}
