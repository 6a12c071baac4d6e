"""Compiling is timed in turns, and what would take too long is left out, and said."""

import argparse
import types

import jax
import pytest


@pytest.fixture
def compile_time(script):
    return script("compile_time")


@pytest.mark.parametrize("leaves", [1, 10, 25])
def test_a_tree_has_as_many_leaves_as_were_asked_for(compile_time, leaves):
    shapes = compile_time.shapes(leaves)
    found = jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, tuple))
    assert len(found) == leaves
    assert len(shapes) == -(-leaves // 10)


def turn(total, cpu):
    return {"trace_s": 0.0, "lower_s": 0.0, "compile_s": total} | {
        "total_s": total,
        "cpu_s": cpu,
    }


def test_ratios_to_optax_are_taken_within_a_turn(compile_time):
    times = {
        "optax": [turn(1.0, 1.0), turn(10.0, 4.0), turn(2.0, 2.0)],
        "optaxclip": [turn(0.5, 2.0), turn(5.0, 8.0), turn(1.0, 4.0)],
    }
    row = compile_time.summarize(times)["optaxclip"]
    assert (row["total_ratio"], row["cpu_ratio"]) == (0.5, 2.0)
    assert (row["compile_s"], row["cpu_s"], row["compiles"]) == (1.0, 4.0, 3)


@pytest.mark.parametrize(("seconds", "turns"), [(0.0, 3), (40.0, 1)])
def test_a_long_turn_is_taken_once(compile_time, monkeypatch, seconds, turns):
    clock = types.SimpleNamespace(perf_counter=iter([0.0, *[seconds] * 3]).__next__)
    monkeypatch.setattr(compile_time, "time", clock)
    monkeypatch.setattr(compile_time, "compile_parts", lambda *_: turn(1.0, 1.0))
    times = compile_time.time_in_turns("global_norm", leaves=1, compiles=3)
    assert {name: len(x) for name, x in times.items()} == dict.fromkeys(
        ("no clip", "optax", "optaxclip"), turns
    )


def test_what_takes_too_long_is_left_out(compile_time, monkeypatch, capsys, tmp_path):
    asked = []

    def report(clip, leaves, compiles):
        asked.append(leaves)
        return [{"total_s": leaves / 10}] * 2

    monkeypatch.setattr(compile_time, "report", report)
    monkeypatch.setattr(compile_time, "time_in_turns", lambda *_, **__: None)
    args = argparse.Namespace(leaves=[1000, 10, 100], limit=30.0, compiles=1, out=None)
    compile_time.run("value", args, machine={})
    assert asked == [10, 100]
    assert "1000  left out: a turn takes 200 s or more" in capsys.readouterr().out


def test_each_part_of_compiling_is_timed(compile_time):
    found = compile_time.compile_parts(jax.jit(lambda x: x + 1), (1.0,))
    parts = [found[part] for part in compile_time.PARTS]
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(found["total_s"])
