"""What does `record` add to a step, as compiled for a machine that is not there?

Run:  python benchmarks/compiled_record.py            # every compiler that is installed
      python benchmarks/compiled_record.py --quick    # the small tree alone

The steps are those of `record.py`, for one device of each kind. The figures are what
the compilers say, and have no noise:

  * kernels, and those that are more than with the clip alone. Those of a TPU's compiler
    count copies to and from its faster memory as well, which overlap with work: there
    the number is no measure.
  * read: what they read. copied: bytes that are copied in every step, over those of
    the gradients.

A clip of leaves has measured what a record wants to know; beside a clip by the global
norm it takes a few kernels more, for of leaves that were measured together each norm is
needed. `record(inner, norm=norms.global_norm)` needs none of them.
"""

from typing import Any

import _steps
import _targets
import _trees
from _steps import CLIP_ALONE
from compiled_guards import compile_all, run
from record import CLIPS

Row = dict[str, Any]

SETTINGS = ("target", "tree", "clip", "contender")
COLUMNS = ("tree", "clip", "record", "kernels", "more", "read MB", "copied")
FORM = "{:8}{:13}{:22}{:>8}{:>6}{:>10}{:>8}"


def report(name: str, tree: str, clip: str) -> list[Row]:
    """Prints a line for each record on one tree, and returns them as rows."""
    common = _targets.describe("compiled_record", name)
    common |= _trees.describe(tree) | {"clip": clip}
    found = compile_all(name, tree, _steps.recorded(clip))
    rows = []
    for contender, row in found.items():
        row["kernels_more"] = row["kernels"] - found[CLIP_ALONE]["kernels"]
        _targets.show(
            *(FORM, tree, clip, contender, row["kernels"], row["kernels_more"]),
            round(row["bytes_read"] / 1e6, 2),
            round(row["copies"], 2),
        )
        rows.append(common | {"contender": contender} | row)
    return rows


if __name__ == "__main__":
    run(__doc__, (FORM, *COLUMNS), CLIPS, report, SETTINGS)
