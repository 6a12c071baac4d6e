"""What does a compiled program say: which kernels does it start, what do they move?"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

CONTROL = {"call", "while"}
# What takes no kernel on a GPU.
NO_KERNELS = {"parameter", "constant", "tuple", "get_tuple_element", "bitcast"}
NO_KERNELS |= {"partition_id", "after_all", *CONTROL}
PICKS = {"slice", "dynamic_slice", "gather"}  # look at a part of their first operand
PUTS = {"dynamic_update_slice": 1, "scatter": 2}  # operand that goes into the first


class Instruction(NamedTuple):
    """One line of a compiled program.

    Attributes:
      kind: its opcode, such as `all_reduce`; of those in two halves the first has the
        name, and the second is `done`.
      shape: type of what it writes; nothing for the first of two halves.
      operands: their names.
      number: which argument a parameter is.
      calls: names of computations that it consists of, or chooses from.
      rounds: how often a loop goes round, if that is known.
      cycles: that the TPU's compiler expects it to take.
    """

    kind: str
    shape: str
    operands: tuple[str, ...]
    number: int
    calls: tuple[str, ...]
    rounds: int
    cycles: int


class Computation(NamedTuple):
    """The instructions by name, who uses each, the last one, and the arguments."""

    lines: dict[str, Instruction]
    users: dict[str, list[str]]
    root: list[str]
    arguments: dict[int, str]


class Program(NamedTuple):
    """The computations by name, and the one that is the program."""

    parts: dict[str, Computation]
    entry: str


HEAD = re.compile(r"(ENTRY )?%?([\w.-]+) .*\{")
LINE = re.compile(r" +(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*?)\)(.*)")
NAME = re.compile(r"%([\w.-]+)")
CALLS = re.compile(r"(?:calls|to_apply|body|\w+_computations?)=(\{.*?\}|%[\w.-]+)")
ROUNDS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")


def read(text: str) -> Program:
    """Returns what a compiled program consists of."""
    parts: dict[str, Computation] = {}
    entry, own = "", Computation({}, {}, [], {})
    for line in text.splitlines():
        if head := HEAD.fullmatch(line):
            entry = head[2] if head[1] else entry
            own = parts[head[2]] = Computation({}, {}, [], {})
        elif found := LINE.fullmatch(line):
            root, name, *rest = found.groups()
            one = own.lines[name] = _instruction(*rest)
            for operand in set(one.operands):
                own.users.setdefault(operand, []).append(name)
            if one.kind == "parameter":
                own.arguments[one.number] = name
            if root:
                own.root.append(name)
    return Program(parts, entry)


def _instruction(kind_shape: str, kind: str, operands: str, rest: str) -> Instruction:
    rounds = ROUNDS.search(rest)
    return Instruction(
        kind="done" if kind.endswith("-done") else _opcode(kind),
        shape="" if kind.endswith("-start") else kind_shape,
        operands=tuple(NAME.findall(operands)),
        number=int(operands) if kind == "parameter" else -1,
        calls=tuple(NAME.findall(" ".join(CALLS.findall(rest)))),
        rounds=int(rounds[1]) if rounds else 1,
        cycles=sum(map(int, CYCLES.findall(rest))),
    )


def _opcode(kind: str) -> str:
    return kind.removesuffix("-start").replace("-", "_")


def size_of(shape: str, everywhere: bool = True) -> int:
    """Returns the bytes of a type, such as `(f32[8,128]{1,0:T(8,128)}, pred[])`.

    Args:
      shape: the type.
      everywhere: whether to count what is in other memory than the device's large one,
        such as the fast one of a TPU, `S(1)`.
    """
    total = 0
    for dtype, dimensions, layout in ARRAY.findall(shape):
        bits = re.search(r"\d+", dtype)
        sizes = [int(size) for size in dimensions.split(",") if size]
        if everywhere or "S(" not in layout:
            total += math.prod(sizes) * (int(bits[0]) // 8 if bits else 1)
    return total


def operand_bytes(part: Computation, one: Instruction) -> int:
    return sum(size_of(part.lines[x].shape) for x in one.operands if x in part.lines)


def in_branches(program: Program) -> set[str]:
    """Returns the computations that may not be run: branches, and what they call."""
    calls: dict[str, set[str]] = {name: set() for name in program.parts}
    found: set[str] = set()
    for name, part in program.parts.items():
        for one in part.lines.values():
            calls[name].update(one.calls)
            found.update(one.calls if one.kind == "conditional" else ())
    while deeper := {x for name in found for x in calls[name]} - found:
        found |= deeper
    return found


def runs(program: Program, where: str) -> Iterator[tuple[str, str, int]]:
    """Yields computation, name and times of each instruction that a step runs.

    What is in branches is left out: they are hardly ever taken. A loop counts as often
    as it goes round, once if the compiler doesn't know how often.
    """
    for name, one in program.parts[where].lines.items():
        if one.kind in CONTROL:
            for called in one.calls:
                for part, own, times in runs(program, called):
                    yield part, own, times * one.rounds
        elif one.kind not in NO_KERNELS:
            yield where, name, 1


def traffic(program: Program, where: str, name: str) -> int:
    """Returns the bytes that an instruction reads from memory and writes to it.

    An operand counts once, and of one that is only sliced its slices; of an array that
    is changed in place the part that is new.
    """
    part = program.parts[where]
    one = part.lines[name]
    if one.kind == "conditional":  # its operands are those of its branches
        return 0
    moved = min(size_of(one.shape, False), _written(program, where, name))
    if one.kind == "done":  # its operands are those of the first half
        return moved
    for operand in set(one.operands):
        size = size_of(part.lines[operand].shape, False)
        moved += min(size, _looked_at(program, where, operand, name))
    return moved


def _written(program: Program, where: str, name: str) -> int:
    """Returns the bytes that are new in what an instruction returns."""
    part = program.parts[where]
    one = part.lines[name]
    if one.kind in ("tuple", "bitcast"):
        return sum(_written(program, where, operand) for operand in one.operands)
    if one.kind == "fusion":
        (inner,) = one.calls
        return _written(program, inner, program.parts[inner].root[0])
    if one.kind in PUTS:
        return size_of(part.lines[one.operands[PUTS[one.kind]]].shape)
    return size_of(one.shape)


def _looked_at(program: Program, where: str, name: str, user: str) -> int:
    """Returns the bytes of a value that one of its users looks at."""
    part = program.parts[where]
    one = part.lines[user]
    first = one.operands[0] == name
    if one.kind in PICKS and first:  # of two halves the second says what comes out
        (second,) = (user,) if one.shape else part.users[user]
        return size_of(part.lines[second].shape)
    if one.kind in PUTS and first:
        return 0
    if one.kind == "bitcast" and user not in part.root:
        return _looked_at_by_all(program, where, user)
    if one.kind == "fusion":
        (inner,) = one.calls
        arguments = program.parts[inner].arguments
        return sum(
            _looked_at_by_all(program, inner, arguments[number])
            for number, operand in enumerate(one.operands)
            if operand == name
        )
    return size_of(part.lines[name].shape)


def _looked_at_by_all(program: Program, where: str, name: str) -> int:
    users = program.parts[where].users.get(name, ())
    return sum(_looked_at(program, where, name, user) for user in users)
