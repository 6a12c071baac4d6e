"""Which tables does the site show? Parts of those of `README.md`, of the same rows."""

import pathlib

from benchmarks import _results, _tables
from benchmarks._tables import Table

DOCS = pathlib.Path(__file__).parents[1] / "docs"
CLIPS = ("global_norm", "leaf_norm", "block_rms", "adaptive", "value")
SIDES = ("optax", "optaxclip")
GPT2 = {"tree": "gpt2", "clip": CLIPS}
NORMS = ("global_norm", "group_norm", "leaf_norm", "adaptive")
ON_8 = {"target": "h200-8", "clip": NORMS}

PAGES = {
    "how_it_is_computed": {
        "whole step": Table(
            "whole_step",
            {"contender": "clip"},
            {"run_ms": "ms", "run_added": "+ % (from/median/to)"},
            only={"optimizer": "momentum"},
        ),
        "step of GPT-2": Table(
            "overhead",
            {"clip": "clip", "floor_ratio": "floor"},
            {"run_ratio": "x"},
            "contender",
            only=GPT2 | {"contender": SIDES},
        ),
        "kernels of GPT-2": Table(
            "compiled",
            {"clip": "clip", "floor_traffic": "least traffic"},
            {"kernels": "kernels", "traffic": "traffic"},
            "contender",
            only=GPT2 | {"dtype": "float32"},
        ),
        "to compile": Table(
            "compile_time",
            {"clip": "clip", "leaves": "leaves"},
            {"total_s": "s"},
            "contender",
            only={"leaves": (10, 100, 1000)},
        ),
    },
    "many_devices": {
        "all-reduces": Table(
            "compiled_collectives",
            {"clip": "clip", "form": "form"},
            {"all_reduce": "all-reduces", "collective_bytes": "bytes"},
            "contender",
            only=ON_8 | {"leaves": 148, "contender": SIDES},
        ),
    },
}


def rewrite(folder: pathlib.Path = _results.FOLDER) -> dict[pathlib.Path, str]:
    """Returns the text of each page with the tables of the rows in a folder."""
    pages = {DOCS / f"{stem}.md": tables for stem, tables in PAGES.items()}
    return {
        page: _tables.rewrite(page.read_text(), folder, tables)
        for page, tables in pages.items()
    }
