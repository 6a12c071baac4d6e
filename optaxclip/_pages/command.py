"""The command line: the verdict of any log, and its report."""

import argparse
import shutil
import sys
import textwrap
from collections.abc import Sequence

from optaxclip._advice.diagnose import diagnose
from optaxclip._looking.history import history
from optaxclip._pages.page import report

DESCRIPTION = """\
Says what a run did, worst first, and what to do about it. The log is a .csv, .jsonl or
.npz file, a trainer_state.json, or a folder with event files of TensorBoard, with a
loss or the norm of the gradient before the clip."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the verdicts of a log, and writes its report where that is asked for.

    Returns the exit status: 0, or 2 for a log that can't be read, or 1 for a report
    that can't be written; then one line on the standard error output says why.
    """
    parser = argparse.ArgumentParser("python -m optaxclip", description=DESCRIPTION)
    parser.add_argument("log", metavar="LOG", help="the log of a run")
    help_text = "write the report, one page of HTML, there"
    parser.add_argument("--out", metavar="REPORT.html", help=help_text)
    options = parser.parse_args(arguments)
    try:
        seen = history(options.log)
    except (ImportError, OSError, ValueError) as error:
        return _failed(error, 2)
    print(_wrapped(diagnose(seen)))
    if options.out is None:
        print("\nFor the pictures add --out report.html.")
        return 0
    try:
        report(seen, options.out)
    except (ImportError, OSError) as error:
        return _failed(error, 1)
    print(f"\nThe report is in {options.out}.")
    return 0


def _wrapped(verdicts: dict[str, str]) -> str:
    """Returns the verdicts, each wrapped to the width of the terminal."""
    width = min(shutil.get_terminal_size().columns, 100)
    options = {"width": width, "break_long_words": False, "break_on_hyphens": False}
    lines = [line for text in verdicts.values() for line in text.splitlines()]
    return "\n\n".join(textwrap.fill(line, **options) for line in lines)


def _failed(error: Exception, status: int) -> int:
    print("optaxclip:", " ".join(str(error).split()), file=sys.stderr)
    return status
