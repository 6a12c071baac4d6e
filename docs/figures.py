"""Draws the figures of the gallery anew: runs the lessons that were changed since.

    python docs/figures.py

`lessons.json` beside them says of which text of its lesson each figure was made.
"""

import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "figures" / "lessons"
MADE_OF = FIGURES / "lessons.json"


def digests():
    """Gives a digest of each lesson as it is now."""
    paths = sorted((ROOT / "examples").glob("*.py"))
    return {x.stem: hashlib.sha256(x.read_bytes()).hexdigest()[:16] for x in paths}


def stale():
    """Gives the lessons whose figure is that of another text, or missing."""
    made_of = json.loads(MADE_OF.read_text()) if MADE_OF.exists() else {}
    now = digests()
    return [x for x in now if made_of.get(x) != now[x] or not _figure(x).exists()]


def _figure(stem):
    return FIGURES / f"{stem}.png"


def _draw(stem):
    script = ROOT / "examples" / f"{stem}.py"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(script)]
        environment = os.environ | {"MPLBACKEND": "Agg"}
        subprocess.run(command, cwd=folder, env=environment, check=True)
        drawn = pathlib.Path(folder, f"{stem}.png")
        _figure(stem).write_bytes(drawn.read_bytes())


if __name__ == "__main__":
    FIGURES.mkdir(parents=True, exist_ok=True)
    for lesson in stale():
        print(f"--- {lesson}", flush=True)
        _draw(lesson)
    MADE_OF.write_text(json.dumps(digests(), indent=2) + "\n")
