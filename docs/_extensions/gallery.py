"""A page for each lesson, and one of all of them, made of the lessons themselves."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
PAGES = ROOT / "docs" / "gallery"
FIRST = "mlp_regression", "find_the_explosion", "choose_a_threshold"

PAGE = """\
# {title}

{text}

![What {stem}.py draws](../figures/lessons/{stem}.png)

```{{literalinclude}} ../../examples/{stem}.py
:language: python
:lines: {first_line}-
```

To run it in a clone: `pip install -e ".[examples]"`, `python examples/{stem}.py`.
"""

INDEX = """\
# Gallery

Each lesson is one file of at most 120 lines, read from top to bottom, that can be
copied alone: data, model, optimizer with the clip, step, loop, figure.

::::{{grid}} 1 2 2 3
:gutter: 3

{cards}
::::

```{{toctree}}
:hidden:

{entries}
```
"""

CARD = """\
:::{{grid-item-card}} {title}
:link: {stem}
:link-type: doc
:img-bottom: ../figures/lessons/{stem}.png
:img-alt: What {stem}.py draws
:::
"""


def lessons():
    """Gives the files, those for beginners first."""
    stems = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}
    return [*(stems.pop(first) for first in FIRST), *stems.values()]


def parts(path):
    """Splits a lesson into what its page is made of."""
    source = path.read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(source)) or ""
    title, _, text = docstring.partition("\n")
    return {
        "stem": path.stem,
        "title": title.rstrip("."),
        # What is printed is indented; Markdown wants an empty line before it.
        "text": re.sub(r"^(\S.*)\n(?=    \S)", r"\1\n\n", text.strip("\n"), flags=re.M),
        "first_line": source[: source.index("import ")].count("\n") + 1,
    }


def write(app):
    """Writes the pages that are not as they should be, and removes all others."""
    PAGES.mkdir(exist_ok=True)
    all_parts = [parts(path) for path in lessons()]
    cards = "\n".join(CARD.format(**part) for part in all_parts)
    entries = "\n".join("{stem}.py <{stem}>".format(**part) for part in all_parts)
    pages = {part["stem"]: PAGE.format(**part) for part in all_parts}
    pages["index"] = INDEX.format(cards=cards, entries=entries)
    for path in PAGES.glob("*.md"):
        if path.stem not in pages:
            path.unlink()
    for stem, page in pages.items():
        path = PAGES / f"{stem}.md"
        if not path.exists() or path.read_text(encoding="utf-8") != page:
            path.write_text(page, encoding="utf-8")


def setup(app):
    """Called by Sphinx."""
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
