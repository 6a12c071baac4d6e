"""What does a compiled step cost, by what its compiler has made of it?"""

import math
from collections.abc import Container
from typing import Any

import jax

import _program

Figures = dict[str, Any]

OTHERS = ("all_gather", "reduce_scatter", "all_to_all", "collective_permute")
COLLECTIVES = ("all_reduce", *OTHERS)


def bytes_of(kind: str, compiled: jax.stages.Compiled) -> int:
    """Returns how many bytes one kind of instruction reads in every step."""
    program = _program.read(compiled.as_text() or "")
    always, _ = _of_kind(program, (kind,))
    return sum(_program.operand_bytes(*one) for one in always)


def cost(compiled: jax.stages.Compiled, gradients: int) -> Figures:
    """Returns the figures of one compiled step, None where its compiler gives none.

    Kernels are what a step starts; `traffic` is what they read and write, `temporary`
    the memory for what is neither argument nor result, both over the gradients' bytes.
    On a TPU traffic is that with its large memory, and kernels are no measure: copies
    to and from the small one are among them, which overlap with work.

    The compiler's time counts those copies, too, the cycles are those of kernels alone;
    neither counts the way between devices. Bytes accessed are a rough figure: copies
    count twice, and branches as if all of them were taken.

    Args:
      compiled: the step.
      gradients: bytes of those on one device.
    """
    program = _program.read(compiled.as_text() or "")
    run = list(_program.runs(program, program.entry))
    lines = [(program.parts[where].lines[name], times) for where, name, times in run]
    moved = sum(times * _program.traffic(program, *at) for *at, times in run)
    own: Any = compiled.cost_analysis() or {}
    memory: Any = compiled.memory_analysis()
    # Each view joined of parts counts as -1 s, and in float32 some us get lost in that.
    seconds = own.get("optimal_seconds", -math.inf)
    seconds += sum(one.kind == "custom_call" for one, _ in lines)
    not_own = ("done", *COLLECTIVES)
    return {
        "kernels": sum(times for one, times in lines if one.kind not in not_own),
        "bytes_moved": moved,
        "traffic": moved / gradients,
        "temporary": memory.temp_size_in_bytes / gradients,
        "conditionals": sum(map(len, _of_kind(program, ("conditional",)))),
        **_collectives(program),
        "estimate_us": round(1e6 * seconds, 1) if 0 < seconds < 1 else None,
        "cycles": sum(one.cycles for one, _ in lines) or None,
        "bytes_accessed": own.get("bytes accessed"),
    }


def _collectives(program: _program.Program) -> Figures:
    always, rare = _of_kind(program, COLLECTIVES)
    kinds = [one.kind for _, one in always]
    return {
        **{kind: kinds.count(kind) for kind in COLLECTIVES},
        "in_branches": len(rare),
        "others_in_branches": sum(one.kind in OTHERS for _, one in rare),
        "collective_bytes": sum(_program.operand_bytes(*one) for one in always),
    }


Found = list[tuple[_program.Computation, _program.Instruction]]


def _of_kind(program: _program.Program, kinds: Container[str]) -> tuple[Found, Found]:
    """Returns the instructions of some kinds: of every step, and of branches."""
    found: tuple[Found, Found] = [], []
    branches = _program.in_branches(program)
    for name, part in program.parts.items():
        same = [(part, one) for one in part.lines.values() if one.kind in kinds]
        found[name in branches].extend(same)
    return found
