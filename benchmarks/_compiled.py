"""What does a compiled step consist of, and what does its compiler say of it?"""

import math
import re
from typing import Any, NamedTuple

import jax

from _targets import Target

Figures = dict[str, Any]

OTHERS = ("all_gather", "reduce_scatter", "all_to_all", "collective_permute")
COLLECTIVES = ("all_reduce", *OTHERS)
# Not work of a GPU, of what its program consists of.
NO_KERNELS = {"parameter", "constant", "tuple", "get_tuple_element", "bitcast"}
NO_KERNELS |= {"partition_id", *COLLECTIVES}


class Instruction(NamedTuple):
    """One line of a compiled program.

    Attributes:
      kind: its opcode, such as `all_reduce`; of those in two halves it is the first.
      bytes: of its operands.
      cycles: that the TPU's compiler expects it to take.
      in_entry: whether it is a step of the program, not a part of one.
      in_branch: whether it is in a branch, which may not be taken.
    """

    kind: str
    bytes: int
    cycles: int
    in_entry: bool
    in_branch: bool


HEAD = re.compile(r"(ENTRY )?%?([\w.-]+) .*\{")
LINE = re.compile(r" +(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*?)\)(.*)")
NAME = re.compile(r"%([\w.-]+)")
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


def read(text: str) -> list[Instruction]:
    """Returns what a compiled program consists of."""
    where = entry = ""
    lines: list[tuple[str, str, list[str], str]] = []
    sizes: dict[tuple[str, str], int] = {}
    calls: dict[str, set[str]] = {}
    branches: set[str] = set()
    for line in text.splitlines():
        if head := HEAD.fullmatch(line):
            where = head[2]
            entry = where if head[1] else entry
        elif found := LINE.fullmatch(line):
            name, shape, kind, operands, attributes = found.groups()
            sizes[where, name] = size_of(shape)
            called = set(NAME.findall(attributes))
            calls.setdefault(where, set()).update(called)
            branches |= called if kind == "conditional" else set()
            lines.append((where, kind, NAME.findall(operands), attributes))
    while deeper := {x for b in branches for x in calls.get(b, ())} - branches:
        branches |= deeper
    return [
        Instruction(
            kind.removesuffix("-start").replace("-", "_"),
            sum(sizes.get((where, name), 0) for name in operands),
            sum(map(int, CYCLES.findall(attributes))),
            where == entry,
            where in branches,
        )
        for where, kind, operands, attributes in lines
        if not kind.endswith("-done")
    ]


def size_of(shape: str) -> int:
    """Returns the bytes of a type, such as `(f32[8,128]{1,0:T(8,128)}, pred[])`."""
    total = 0
    for dtype, dimensions in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", shape):
        bits = re.search(r"\d+", dtype)
        sizes = [int(size) for size in dimensions.split(",") if size]
        total += math.prod(sizes) * (int(bits[0]) // 8 if bits else 1)
    return total


def bytes_of(kind: str, compiled: jax.stages.Compiled) -> int:
    """Returns how many bytes one kind of instruction reads in every step."""
    program = read(compiled.as_text() or "")
    return sum(x.bytes for x in program if x.kind == kind and not x.in_branch)


def cost(target: Target, compiled: jax.stages.Compiled) -> Figures:
    """Returns the figures of one compiled step, None where its compiler gives none.

    The compiler's time counts copies that overlap with work, the cycles are those of
    kernels alone; neither counts the way between devices. Bytes accessed are a rough
    figure, too: copies count twice, and branches as if all of them were taken.
    """
    program = read(compiled.as_text() or "")
    entry = [x for x in program if x.in_entry]
    collectives = [x for x in program if x.kind in COLLECTIVES]
    always = [x for x in collectives if not x.in_branch]
    rare = [x for x in collectives if x.in_branch]
    own: Any = compiled.cost_analysis() or {}
    # Each view joined of parts counts as -1 s, and in float32 some us get lost in that.
    seconds = own.get("optimal_seconds", -math.inf)
    seconds += sum(x.kind == "custom_call" for x in entry)
    return {
        **{kind: sum(x.kind == kind for x in always) for kind in COLLECTIVES},
        "in_branches": len(rare),
        "others_in_branches": sum(x.kind in OTHERS for x in rare),
        "collective_bytes": sum(x.bytes for x in always),
        "estimate_us": round(1e6 * seconds) if 0 < seconds < 1 else None,
        "cycles": sum(x.cycles for x in entry) or None,
        "bytes_accessed": own.get("bytes accessed"),
        "kernels": sum(x.kind not in NO_KERNELS for x in entry)
        if target.backend == "gpu"
        else None,
    }
