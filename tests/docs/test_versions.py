"""What is released says everywhere which version it is."""

import pathlib
import re

from helpers import oc

ROOT = pathlib.Path(__file__).parents[2]


def test_the_version_is_that_of_the_changelog_and_of_the_citation():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    version, date = re.findall(r"## \[(\d.*)\] - (\S+)", changelog)[0]
    cited = dict(line.split(": ", 1) for line in citation.splitlines() if ": " in line)
    assert version == oc.__version__
    assert (cited["version"], cited["date-released"]) == (version, date)


def test_the_classifiers_name_the_pythons_that_are_tested():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    versions = re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', text)
    oldest = re.findall(r'requires-python = ">=3\.(\d+)"', text)
    assert versions[:1] == oldest and versions == sorted(versions)
