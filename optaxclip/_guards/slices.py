"""How is a slice computed without all the rest of the array?

A slice of what is made element by element is made of slices. So each is taken as far
back in the program as that goes, best of its arguments. XLA does not do so by itself: a
TPU writes the whole array to memory, and reads from that what is asked for.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

_BY_ELEMENT = frozenset(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp complex"
    " conj convert_element_type copy cos cosh digamma div eq erf erf_inv erfc exp exp2"
    " expm1 floor ge gt imag integer_pow is_finite le lgamma log log1p logistic lt max"
    " min mul ne neg nextafter not or pcast pow pvary real reduce_precision rem round"
    " rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin"
    " sinh sqrt square sub tan tanh xor".split()
)
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "checkpoint": "jaxpr"}
_CALLS |= {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}

_ROOM = 2**18  # elements; of a slice that goes over more of them a TPU keeps too much

Strides = tuple[int, ...] | None  # along each axis; None for all of an array
Take = Callable[[Any, tuple[int, ...]], jax.Array]  # array, strides -> a slice
Whole = Callable[[Any], Any]
Name = tuple[int, core.Var]  # of a value: that of a variable in one of the calls
Names = Mapping[core.Var, Any]


class _Step(NamedTuple):
    """An equation, and what it is given and gives: names, or numbers."""

    eqn: core.JaxprEqn
    inputs: list[Any]
    outputs: list[Any]


def strides(shape: Sequence[int], count: int) -> tuple[int, ...]:
    """Returns those of at most so many elements, evenly spread along all axes."""
    found = [1] * len(shape)
    order = sorted(range(len(shape)), key=lambda axis: shape[axis])
    for done, axis in enumerate(order):
        size = shape[axis]
        own = max(1, int(count ** (1 / (len(shape) - done)) + 1e-9))
        found[axis] = math.ceil(size / own)
        count //= math.ceil(size / found[axis])
    return tuple(found)


def asked_for(x: Any, by: tuple[int, ...]) -> jax.Array:
    """Returns a slice of what is in a program for `run`."""
    return x if max(by, default=1) == 1 else jax.lax.slice(x, [0] * x.ndim, x.shape, by)


def sliced(x: Any, by: tuple[int, ...]) -> jax.Array:
    """Returns a slice."""
    if x.ndim > 1 and by[-2] * x.shape[-1] > _ROOM:
        pairs = zip(x.shape, by, strict=True)
        return x[np.ix_(*(np.arange(0, size, step) for size, step in pairs))]
    return asked_for(x, by)


def run(
    closed: Any,
    outputs: int,
    consts: Sequence[Any],
    whole: Sequence[Callable[..., Any]],
) -> list[Any]:
    """Returns the last outputs of a program, of slices that are taken first.

    Args:
      closed: the program, without arguments.
      outputs: how many.
      consts: what it is about.
      whole: function for each of those, which it goes through if all of it is needed.
    """
    names: dict[core.Var, Any] = {}
    steps = list(_steps(closed.jaxpr, names, itertools.count()))
    ends = [_name(x, names) for x in closed.jaxpr.outvars[-outputs:]]
    wanted = _wanted(steps, ends)
    values: dict[Any, Any] = {}
    for i, var in enumerate(closed.jaxpr.constvars):
        for by in wanted.get(names[var], ()):
            values[names[var], by] = (
                whole[i](consts[i]) if by is None else sliced(consts[i], by)
            )

    def value(name: Any, by: Strides) -> Any:
        return name.val if isinstance(name, core.Literal) else values[name, by]

    for step in steps:
        for by in _asked(step, wanted):
            operands = map(value, step.inputs, _of_operands(step.eqn, by))
            every = _outputs(closed, step.eqn, list(operands), by)
            values |= {(x, by): y for x, y in zip(step.outputs, every, strict=True)}
        for name, by in _cut(step, wanted):
            values[name, by] = sliced(values[name, None], by)
    return [value(name, None) for name in ends]


def _steps(jaxpr: Any, names: Any, numbers: Iterator[int]) -> Iterator[_Step]:
    """Yields the equations, those of calls in their place, and names what they give."""
    number = next(numbers)
    names |= {var: (number, var) for var in jaxpr.constvars}
    for eqn in jaxpr.eqns:
        inputs = [_name(x, names) for x in eqn.invars]
        inside = _inside(eqn)
        if inside is None:
            names |= {var: (number, var) for var in eqn.outvars}
            yield _Step(eqn, inputs, [names[var] for var in eqn.outvars])
        else:
            own = dict(zip(inside.invars, inputs, strict=True))
            yield from _steps(inside, own, numbers)
            outputs = (_name(x, own) for x in inside.outvars)
            names |= dict(zip(eqn.outvars, outputs, strict=True))


def _inside(eqn: core.JaxprEqn) -> Any:
    """Returns the program that is called to make something large, None if none is."""
    called = eqn.params.get(_CALLS.get(eqn.primitive.name, ""))
    jaxpr = getattr(called, "jaxpr", called)
    if jaxpr is None or getattr(called, "consts", ()) or jaxpr.constvars:
        return None
    return jaxpr if any(map(_shape, eqn.outvars)) else None


def _shape(atom: Any) -> tuple[int, ...]:
    return getattr(atom.aval, "shape", ())  # a token has none


def _name(atom: Any, names: Names) -> Any:
    return atom if isinstance(atom, core.Literal) else names[atom]


def _wanted(steps: Sequence[_Step], ends: Sequence[Any]) -> dict[Any, set[Strides]]:
    """Returns of each name which slices of it are needed."""
    found: dict[Any, set[Strides]] = {x: {None} for x in ends if isinstance(x, tuple)}
    for step in reversed(steps):
        for by in _asked(step, found):
            parts = _of_operands(step.eqn, by)
            for name, part in zip(step.inputs, parts, strict=True):
                if not isinstance(name, core.Literal):
                    found.setdefault(name, set()).add(part)
    return found


def _asked(step: _Step, wanted: Mapping[Any, set[Strides]]) -> set[Strides]:
    """Returns of which slices a step is made."""
    every = set[Strides]().union(*(wanted.get(x, ()) for x in step.outputs))
    if step.eqn.effects:
        return {None}
    return every if _passes(step.eqn) or not every else {None}


def _cut(
    step: _Step, wanted: Mapping[Any, set[Strides]]
) -> Iterator[tuple[Any, tuple[int, ...]]]:
    """Yields which slices are taken of what a step has made as a whole."""
    if not _passes(step.eqn):
        for name in step.outputs:
            yield from ((name, by) for by in wanted.get(name, ()) if by is not None)


def _passes(eqn: core.JaxprEqn) -> bool:
    name, params = eqn.primitive.name, eqn.params
    if params.get("sharding") is not None:
        return False
    return name in _BY_ELEMENT or (name == "broadcast_in_dim" and len(eqn.invars) == 1)


def _of_operands(eqn: core.JaxprEqn, by: Strides) -> list[Strides]:
    shapes: list[tuple[int, ...]] = [_shape(x) for x in eqn.invars]
    if by is None:
        return (
            [_of_slice(eqn)] if eqn.primitive.name == "slice" else [None] * len(shapes)
        )
    if eqn.primitive.name == "broadcast_in_dim":
        dimensions = zip(eqn.params["broadcast_dimensions"], shapes[0], strict=True)
        own = tuple(by[i] if size > 1 else 1 for i, size in dimensions)
        return [own if max(own, default=1) > 1 else None]
    return [by if shape else None for shape in shapes]


def _of_slice(eqn: core.JaxprEqn) -> Strides:
    """Returns the strides if that is all that the slice consists of."""
    shape, params = _shape(eqn.invars[0]), eqn.params
    is_whole = not any(params["start_indices"]) and params["limit_indices"] == shape
    return params["strides"] if is_whole else None


def _outputs(
    closed: Any, eqn: core.JaxprEqn, operands: list[Any], by: Strides
) -> list[Any]:
    """Returns what an equation makes of slices of its operands, or of all of them."""
    if by is None and eqn.primitive.name == "slice" and _of_slice(eqn):
        return operands
    if by is None:
        pairs = zip(eqn.invars, operands, strict=True)
        given = [(x, y) for x, y in pairs if isinstance(x, core.Var)]
        jaxpr = closed.jaxpr.replace(
            constvars=[], invars=[x for x, _ in given], eqns=[eqn], outvars=eqn.outvars
        )
        own = closed.replace(jaxpr=jaxpr, consts=[])
        return core.jaxpr_as_fun(own)(*(y for _, y in given))
    params = eqn.params
    if eqn.primitive.name == "broadcast_in_dim":
        pairs = zip(params["shape"], by, strict=True)
        params = params | {"shape": tuple(math.ceil(size / n) for size, n in pairs)}
    with eqn.ctx.manager:
        return [eqn.primitive.bind(*operands, **params)]
