"""What a compiled program starts, reads and writes is read from its text."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import _program

ROW, ALL = 4 * 100, 4 * 8 * 100  # bytes

# What fusions of the programs below consist of.
BODIES = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%twice (p0: f32[8,100]) -> f32[8,100] {
  %p0.1 = f32[8,100]{1,0} parameter(0)
  ROOT %sum = f32[8,100]{1,0} add(%p0.1, %p0.1)
}

%row (p0: f32[8,100], p1: s32[]) -> f32[1,100] {
  %p0.2 = f32[8,100]{1,0} parameter(0)
  %p1.2 = s32[] parameter(1)
  %view = f32[8,100]{1,0} bitcast(%p0.2)
  ROOT %picked = f32[1,100]{1,0} dynamic-slice(%view, %p1.2, %p1.2)
}

%row_within (p0: f32[8,100], p1: s32[]) -> f32[1,100] {
  %p0.3 = f32[8,100]{1,0} parameter(0)
  %p1.3 = s32[] parameter(1)
  ROOT %inner = f32[1,100]{1,0} fusion(%p0.3, %p1.3), kind=kLoop, calls=%row
}

%row_and_all (p0: f32[8,100], p1: s32[]) -> (f32[1,100], f32[8,100]) {
  %p0.4 = f32[8,100]{1,0} parameter(0)
  %p1.4 = s32[] parameter(1)
  %one = f32[1,100]{1,0} dynamic-slice(%p0.4, %p1.4, %p1.4)
  %minus = f32[8,100]{1,0} negate(%p0.4)
  ROOT %both = (f32[1,100]{1,0}, f32[8,100]{1,0}) tuple(%one, %minus)
}

%put (p0: f32[8,100], p1: f32[1,100], p2: s32[]) -> f32[8,100] {
  %p0.5 = f32[8,100]{1,0} parameter(0)
  %p1.5 = f32[1,100]{1,0} parameter(1)
  %p2.5 = s32[] parameter(2)
  %new = f32[8,100]{1,0} dynamic-update-slice(%p0.5, %p1.5, %p2.5, %p2.5)
  ROOT %same = f32[8,100]{1,0} bitcast(%new)
}

%nothing (p0: f32[8,100]) -> f32[8,100] {
  ROOT %p0.6 = f32[8,100]{1,0} parameter(0)
}

%summed (p0: f32[8,100]) -> f32[8,100] {
  %p0.7 = f32[8,100]{1,0} parameter(0)
  %reduced = f32[8,100]{1,0} all-reduce(%p0.7), to_apply=%add
  ROOT %negative = f32[8,100]{1,0} negate(%reduced)
}

ENTRY %main (x: f32[8,100], r: f32[1,100], i: s32[]) -> f32[8,100] {
  %x = f32[8,100]{1,0} parameter(0), sharding={replicated}
  %r = f32[1,100]{1,0} parameter(1)
  %i = s32[] parameter(2)
"""


def program(*lines: str) -> _program.Program:
    return _program.read(BODIES + "".join(f"  {line}\n" for line in lines) + "}\n")


def moved(*lines: str) -> int:
    """Returns what a program of some lines moves, less the places of slices."""
    found = program(*lines)
    runs = _program.runs(found, found.entry)
    return sum(times * _program.traffic(found, *at) for *at, times in runs)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[]", 4),
        ("pred[3]{0}", 3),
        ("bf16[8,128]{1,0:T(8,128)(2,1)}", 2048),
        ("(f32[2]{0}, (s32[], f8e4m3fn[5]{0}))", 17),
    ],
)
def test_a_type_is_as_large_as_its_arrays(shape, size):
    assert _program.size_of(shape) == size


def test_memory_on_the_chip_can_be_left_out():
    shape = "(f32[10]{0:T(128)S(1)}, f32[1]{0:T(128)}, u32[]{:S(2)})"
    assert _program.size_of(shape, everywhere=False) == 4


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ("ROOT %y = f32[8,100]{1,0} negate(%x)", 2 * ALL),
        ("ROOT %y = f32[8,100]{1,0} multiply(%x, %x)", 2 * ALL),
        ("ROOT %y = f32[8,100]{1,0} fusion(%x), kind=kLoop, calls=%twice", 2 * ALL),
        ("ROOT %y = f32[1,100]{1,0} dynamic-slice(%x, %i, %i)", 2 * ROW + 4),
        ("ROOT %y = f32[1,100]{1,0} fusion(%x, %i), calls=%row", 2 * ROW + 4),
        ("ROOT %y = f32[1,100]{1,0} fusion(%x, %i), calls=%row_within", 2 * ROW + 4),
        (
            "ROOT %y = (f32[1,100]{1,0}, f32[8,100]{1,0}) fusion(%x, %i),"
            " kind=kLoop, calls=%row_and_all",
            2 * ALL + ROW + 4,
        ),
        ("ROOT %y = f32[8,100]{1,0} fusion(%x, %r, %i), calls=%put", 2 * ROW + 4),
    ],
    ids=["all", "twice", "fused", "slice", "bitcast", "nested", "both", "in_place"],
)
def test_a_kernel_moves_what_it_reads_and_writes_once(line, size):
    assert moved(line) == size


def test_what_a_tpu_keeps_on_the_chip_is_not_moved():
    copied = moved(
        "%s = (f32[8,100]{1,0:S(1)}, f32[8,100]{1,0}, u32[]) copy-start(%x)",
        "%d = f32[8,100]{1,0:S(1)} copy-done(%s)",
        "%y = f32[8,100]{1,0:S(1)} negate(%d)",
        "%s.1 = (f32[8,100]{1,0}, f32[8,100]{1,0:S(1)}, u32[]) copy-start(%y)",
        "ROOT %z = f32[8,100]{1,0} copy-done(%s.1)",
    )
    assert copied == 2 * ALL


def test_a_slice_that_is_copied_to_the_chip_is_read_in_its_own_size():
    copied = moved(
        "%s = ((f32[8,100]{1,0}), f32[1,100]{1,0:S(1)}, s32[]) slice-start(%x)",
        "%d = f32[1,100]{1,0:S(1)} slice-done(%s)",
        "ROOT %y = f32[1,100]{1,0:S(1)} negate(%d)",
    )
    assert copied == ROW


def kinds(*lines: str) -> list[tuple[str, int]]:
    found = program(*lines)
    runs = _program.runs(found, found.entry)
    return [(found.parts[part].lines[name].kind, times) for part, name, times in runs]


def test_a_loop_runs_as_often_as_it_goes_round():
    line = (
        "ROOT %y = f32[8,100]{1,0} while(%x), condition=%nothing, body=%summed,"
        ' backend_config={"known_trip_count":{"n":"5"}}'
    )
    assert kinds(line) == [("all_reduce", 5), ("negate", 5)]
    assert moved(line) == 5 * 4 * ALL


def test_what_is_in_a_branch_is_left_out():
    line = (
        "ROOT %y = f32[8,100]{1,0} conditional(%i, %x, %x),"
        " branch_computations={%nothing, %summed}"
    )
    assert kinds(line) == [("conditional", 1)]
    assert moved(line) == 0
    assert _program.in_branches(program(line)) == {"nothing", "summed", "add"}


def test_a_call_is_what_it_calls_and_a_view_is_nothing():
    lines = (
        "%y = f32[8,100]{1,0} call(%x), to_apply=%summed",
        "%t = (f32[8,100]{1,0}, f32[1,100]{1,0}) tuple(%y, %r)",
        "ROOT %z = f32[8,100]{1,0} get-tuple-element(%t), index=0",
    )
    assert kinds(*lines) == [("all_reduce", 1), ("negate", 1)]
    assert not _program.in_branches(program(*lines))


def test_a_program_as_it_is_compiled_here_moves_what_it_has_to():
    x = jnp.zeros(1000)
    compiled = jax.jit(lambda x, y: jnp.sin(x) + y).lower(x, x).compile()
    found = _program.read(compiled.as_text() or "")
    ((*at, times),) = _program.runs(found, found.entry)
    assert times * _program.traffic(found, *at) == 3 * 4 * 1000
