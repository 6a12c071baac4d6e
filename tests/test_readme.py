"""The README's snippets run in order and print what it says."""

import pathlib
import re

README = pathlib.Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"```python\n(.*?)```(?:\n+```text\n(.*?)```)?", re.DOTALL)


def test_the_readme_prints_what_it_says(capsys):
    names = {}
    blocks = BLOCK.findall(README.read_text(encoding="utf-8"))
    for code, _ in blocks:
        exec(compile(code, README.name, "exec"), names)
    assert capsys.readouterr().out == "".join(output for _, output in blocks)


def test_the_readme_names_only_files_that_exist():
    links = re.findall(r"\]\(([^):]+)\)", README.read_text(encoding="utf-8"))
    missing = [link for link in links if not (README.parent / link).exists()]
    assert links and not missing
