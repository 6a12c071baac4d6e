"""Whichever library one takes on the page for beginners, all of the page holds."""

import pathlib
import re
from typing import Any

import chex
import jax
import numpy as np
import pytest

import optaxclip

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "start.md"
TEXT = PAGE.read_text(encoding="utf-8")
TABS = dict(
    re.findall(
        r"^:::\{tab-item\} (.*?)\n.*?```python\n(.*?)```", TEXT, re.DOTALL | re.M
    )
)
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def run(library):
    """What a reader has who runs the page with one tab, and not the run that is NaN."""
    places = [place for place, code in enumerate(BLOCKS) if code in TABS.values()]
    before, after = BLOCKS[: places[0]], BLOCKS[places[-1] + 2 :]
    names: dict[str, Any] = {}
    for code in [*before, TABS[library], *after]:
        exec(compile(code, PAGE.name, "exec"), names)
    return names


def test_the_libraries_are_those_of_the_design():
    names = ["Flax linen", "Flax nnx", "Equinox", "Haiku", "Plain pytrees"]
    assert list(TABS) == names


@pytest.mark.parametrize("library", TABS)
def test_every_library_is_guarded_and_recorded_by_the_same_lines(library):
    names = run(library)
    bad = (names["batches"] == 3).any(axis=1)
    seen = optaxclip.summary(names["opt_state"], names["params"])
    chex.assert_tree_all_finite(jax.tree.leaves(names["params"]))
    assert seen["guard/skipped_count"] == bad.sum() == 53
    assert seen["guard/last_skipped_step"] == np.flatnonzero(bad)[-1]
    assert seen["clip/update_count"] == (~bad).sum()

    history = names["history"]
    assert history["width"].sum() == len(bad)
    assert history["loss"][-1] < 0.01 * history["loss"][0]
    assert "healthy" in optaxclip.diagnose(history)
