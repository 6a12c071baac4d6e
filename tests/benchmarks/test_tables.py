"""Tables are made of the rows that are kept, and no figure of the page by hand."""

import json

import pytest

from benchmarks import _site, _tables

TABLE = _tables.Table(
    "speed", {"tree": "tree"}, {"ms": "ms", "ratio": "x"}, "contender", floor="0 ms."
)


def make_row(tree="lstm", contender="ours", ms=1.5, ratio=2.0, **fields):
    return {
        "date": "2026-01-01 00:00",
        "device": "AMD EPYC",
        "platform": "cpu",
        "cpus": 2,
        "jax": "0.12.0",
        "optaxclip": "0.1.0",
        "question": "speed",
        "tree": tree,
        "elements": {"lstm": 10, "gpt2": 1000}[tree],
        "contender": contender,
        "ms": ms,
        "ratio": ratio,
    } | fields


def lines_of(*rows, table=TABLE):
    titles, body = _tables.cells(table, _tables.newest(table, rows))
    return [titles, *body]


@pytest.fixture
def render(tmp_path):
    """Keeps rows and renders a table of them."""

    def render(*rows, folder="cpu"):
        path = tmp_path / folder / "speed.jsonl"
        path.parent.mkdir()
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return _tables.render(TABLE, tmp_path)

    return render


def test_the_page_shows_the_rows_that_are_kept():
    text = _tables.PAGE.read_text()
    message = "`python -m benchmarks --tables` makes the page anew"
    assert _tables.rewrite(text) == text, message


def test_the_pages_of_the_site_show_the_rows_that_are_kept():
    message = "`python -m benchmarks --tables` makes the pages anew"
    assert _site.PAGES
    for page, text in _site.rewrite().items():
        assert page.read_text() == text, message


def test_contenders_stand_side_by_side_and_trees_go_from_small_to_large():
    rows = [make_row("gpt2", "optax", ms=3.0), make_row("gpt2"), make_row()]
    assert lines_of(*rows) == [
        ["tree", "optax ms", "ours ms", "optax x", "ours x"],
        ["lstm", "-", "1.5", "-", "2"],
        ["gpt2", "3", "1.5", "2", "2"],
    ]


def test_a_baseline_has_no_column_of_ones():
    rows = [make_row(contender="optax", ratio=1.0), make_row()]
    assert lines_of(*rows)[0] == ["tree", "optax ms", "ours ms", "ours x"]


def test_the_newest_row_of_a_setting_is_shown():
    new = make_row(ms=7.0, date="2026-01-02 00:00")
    assert lines_of(new, make_row())[1] == ["lstm", "7", "2"]


def test_several_versions_of_jax_have_a_column():
    titles, *body = lines_of(make_row(jax="0.10.2"), make_row("gpt2"))
    assert titles[:2] == ["tree", "jax"]
    assert [line[:2] for line in body] == [["lstm", "0.10.2"], ["gpt2", "0.12.0"]]


def test_rows_of_other_work_are_not_shown():
    table = TABLE._replace(only={"work": "step"})
    rows = [make_row(work="step"), make_row("gpt2", work="clip alone")]
    assert [line[0] for line in lines_of(*rows, table=table)] == ["tree", "lstm"]


def test_rows_of_one_of_several_values_are_shown():
    table = TABLE._replace(only={"contender": ("ours", "optax")})
    rows = [make_row(contender=name) for name in ("ours", "optax", "no clip")]
    assert lines_of(*rows, table=table)[0][1:3] == ["optax ms", "ours ms"]


def test_each_device_has_a_part_with_versions_days_and_floor(render):
    gpu = {"device": "NVIDIA H200", "platform": "gpu"}
    render(make_row(), folder="cpu")
    days = [make_row(date=f"2026-01-0{i} 00:00") | gpu for i in (2, 3)]
    text = render(days[0], days[1] | {"tree": "gpt2"}, folder="gpu")
    assert "**AMD EPYC, 2 cores**: jax 0.12.0, optaxclip 0.1.0; 2026-01-01.\n" in text
    assert "**NVIDIA H200**: jax 0.12.0, optaxclip 0.1.0; 2026-01-02 to" in text
    assert text.count("Floor: 0 ms.\n\n| tree | ours ms | ours x |\n| --- |") == 2


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((None, "-"), (12345, "12345"), (12345.6, "12346"), (0.123456, "0.123")),
        *((7.04e-8, "7.04e-08"), ([1.0, 2.5], "1/2.5"), ("gpt2", "gpt2")),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert _tables.short(value) == text


def test_what_stands_in_a_place_is_replaced_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(_tables, "TABLES", {"speed": TABLE})
    page = "before\n<!-- table: speed -->\n{}<!-- end -->\nafter\n"
    full, empty = page.format("\nold\n\n| 1 |\n"), page.format("")
    assert _tables.rewrite(full, tmp_path) == _tables.rewrite(empty, tmp_path) == empty


@pytest.mark.parametrize("name", ["sped", ""], ids=["a stranger", "none"])
def test_a_table_without_a_place_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.setattr(_tables, "TABLES", {"speed": TABLE})
    page = f"<!-- table: {name} -->\n<!-- end -->\n" * bool(name)
    with pytest.raises(ValueError, match=r"Each table needs one place.*\['speed'\]"):
        _tables.rewrite(page, tmp_path)
