"""How is a step undone without a copy of the state it began with?

Each entry of the new state is selected where it is computed, and what follows, the
updates too, goes by the selected one. If the step is taken, that is the same; if not,
the updates are not used. Selected at the end, the state of before is still needed for
the params when the new state is written over it, at least on a CPU, where either has a
loop of its own: then all of it is copied.

So what comes out has to be known before the first entry is written. A program that is
cheap to repeat is run once more for it, as far as it is looked at; of any other the
state is selected at the end.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from optaxclip._guards import outcomes, slices

# Not to be repeated, where they make something large.
_HEAVY = {"cond", "scan", "while", "dot_general", "conv_general_dilated", "sort", "fft"}
_HEAVY |= {"cholesky", "eigh", "svd", "qr", "lu", "triangular_solve"}
_HARMLESS = 0.5  # a finite number whose root, logarithm and inverse have derivatives

# Updates, params, and how to take a slice -> which broke.
Look = Callable[[Any, Any, slices.Take], jax.Array]


class Taken(NamedTuple):
    """What is left of a step.

    Attributes:
      updates: those of a skipped step add nothing.
      state: the state that is kept.
      broken: what broke in it, booleans.
    """

    updates: Any
    state: Any
    broken: jax.Array


@jax.jit  # one equation, whatever the types
def select(skip: Any, old: Any, new: Any) -> jax.Array:
    return jnp.where(skip, old, new)


def take(
    step: Callable[[], tuple[Any, Any]],
    state: Any,
    params: Any,
    skip: jax.Array,
    look: Look,
) -> Taken:
    """Takes a step, unless it is to be skipped or breaks something.

    Args:
      step: function that returns updates and the new state.
      state: the state of before.
      params: what the updates are for, or None.
      skip: whether to skip the step, boolean.
      look: function from updates and params to booleans, what of them broke.
    """
    if _known(skip) is not None:  # nothing is compiled
        updates, new = step()
        broken = look(updates, params, slices.sliced)
        is_skipped = bool(skip) or bool(jnp.any(broken))
        kept = jax.tree.map(outcomes.nothing, updates) if is_skipped else updates
        return Taken(kept, state if is_skipped else new, broken)

    def looked() -> Any:
        updates, new = step()
        return (updates, new), look(updates, params, slices.asked_for)

    closed, (shapes, _) = jax.make_jaxpr(looked, return_shape=True)()
    program = _Program(closed, len(jax.tree.leaves(shapes[1])))
    hidden = {id(x) for x in jax.tree.leaves((state, params)) if _is_large(x)}
    is_hidden = [id(x) in hidden for x in closed.consts]

    def undone(skip: Any, old: Any, consts: list[Any]) -> Any:
        if program.is_cheap():
            hidden = [_hide if hide else _same for hide in is_hidden]
            (broken,) = slices.run(closed, 1, consts, hidden)
            return program.selected(skip | jnp.any(broken), old, consts), broken
        count, shown = len(closed.jaxpr.outvars), [_same] * len(consts)
        *flat, broken = slices.run(closed, count, consts, shown)
        return program.chosen(skip | jnp.any(broken), old, flat), broken

    taken = _differentiable(undone, program)
    flat, broken = taken(skip, jax.tree.leaves(state), closed.consts)
    updates, kept = jax.tree.unflatten(jax.tree.structure(shapes), flat)
    return Taken(updates, kept, broken)


class _Program(NamedTuple):
    """A step as equations, which gives updates, so many entries, and what broke."""

    closed: Any
    entries: int

    @property
    def start(self) -> int:
        return len(self.closed.jaxpr.outvars) - 1 - self.entries

    def is_cheap(self) -> bool:
        jaxpr = self.closed.jaxpr
        return not jaxpr.effects and not any(map(_is_heavy, _eqns(jaxpr)))

    def run(self, consts: Sequence[Any]) -> list[Any]:
        jaxpr = _without_last(self.closed.jaxpr)
        return core.jaxpr_as_fun(
            self.closed.replace(jaxpr=jaxpr, consts=list(consts))
        )()

    def chosen(self, skip: Any, old: list[Any], flat: list[Any]) -> list[Any]:
        """Returns the outputs, of the state those that are kept."""
        pairs = zip(old, flat[self.start :], strict=True)
        nothing = map(outcomes.nothing, flat[: self.start])
        updates = map(functools.partial(select, skip), nothing, flat[: self.start])
        return [*updates, *(select(skip, *pair) for pair in pairs)]

    def selected(self, skip: Any, old: list[Any], consts: list[Any]) -> list[Any]:
        """Returns the same, of selections that are made early."""
        closed = jax.make_jaxpr(lambda: self.chosen(skip, old, self.run(consts)))()
        jaxpr = _select_early(closed.jaxpr, self.entries)
        return core.jaxpr_as_fun(closed.replace(jaxpr=jaxpr))()


def _known(skip: Any) -> bool | None:
    """Returns whether to skip, None where that is not known yet."""
    try:
        return bool(skip)
    except jax.errors.ConcretizationTypeError:
        return None


def _is_large(x: Any) -> bool:
    return jnp.ndim(x) > 0 and bool(jnp.issubdtype(jnp.result_type(x), jnp.inexact))


def _same(x: Any) -> Any:
    return x


def _hide(x: Any) -> Any:
    """Returns the same to the user, and another array to the compiler.

    It would otherwise find out that the step is computed twice, and keep the first.
    """
    return jax.lax.optimization_barrier(x)


def _eqns(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """Yields the equations, those in functions and branches too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for some in value if isinstance(value, tuple | list) else [value]:
                inside = getattr(some, "jaxpr", some)
                if isinstance(inside, core.Jaxpr):
                    yield from _eqns(inside)


def _is_heavy(eqn: core.JaxprEqn) -> bool:
    sizes = [math.prod(getattr(v.aval, "shape", ())) for v in eqn.outvars]
    return eqn.primitive.name in _HEAVY and max(sizes, default=0) > outcomes.LOOKED_AT


def _differentiable(undone: Callable[..., Any], program: _Program) -> Any:
    """Returns ``undone`` with the derivative of nothing where nothing happened.

    A derivative that is selected away is multiplied by 0 on its way back, and 0 times
    infinity is NaN. So there it is taken at some harmless place.
    """
    taken = jax.custom_jvp(undone)

    @taken.defjvp
    def rule(primals: Any, tangents: Any) -> Any:
        flat, broken = taken(*primals)
        skip = primals[0] | jnp.any(broken)
        safe = [_harmless(skip, x) for x in primals[2]]
        _, found = jax.jvp(lambda *x: program.run(x), tuple(safe), tuple(tangents[2]))
        kept = [*map(_zeros, found[: program.start]), *tangents[1]]
        pairs = zip(kept, found, strict=True)
        slopes = [b if _is_nothing(b) else jnp.where(skip, a, b) for a, b in pairs]
        return (flat, broken), (slopes, np.zeros(broken.shape, jax.dtypes.float0))

    return taken


def _harmless(skip: Any, x: Any) -> Any:
    if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
        return x
    return jnp.where(skip, jnp.full_like(x, _HARMLESS), x)


def _is_nothing(tangent: Any) -> bool:
    return tangent.dtype == jax.dtypes.float0


def _zeros(tangent: Any) -> Any:
    return tangent if _is_nothing(tangent) else jnp.zeros_like(tangent)


def _without_last(jaxpr: Any) -> Any:
    """Returns the program without its last output, and what only that needs."""
    outvars, eqns = jaxpr.outvars[:-1], []
    needed = {x for x in outvars if isinstance(x, core.Var)}
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not needed.isdisjoint(eqn.outvars):
            eqns.append(eqn)
            needed.update(x for x in eqn.invars if isinstance(x, core.Var))
    return jaxpr.replace(eqns=eqns[::-1], outvars=outvars)


def _select_early(jaxpr: core.Jaxpr, count: int) -> core.Jaxpr:
    """Moves selections to where there is something to select.

    Args:
      jaxpr: its last outputs are selected, each by an equation of its own.
      count: how many of them there are.
    """
    makers: dict[Any, core.JaxprEqn] = {v: e for e in jaxpr.eqns for v in e.outvars}
    selections = [makers[v] for v in jaxpr.outvars[len(jaxpr.outvars) - count :]]
    new = [(x.invars[2], x) for x in selections if isinstance(x.invars[2], core.Var)]
    early = {var: x for var, x in new if var in makers}
    moved = {x.outvars[0] for x in early.values()}
    names: dict[Any, Any] = {}
    eqns = []

    def renamed(atoms: list[Any]) -> list[Any]:
        return [names.get(x, x) if isinstance(x, core.Var) else x for x in atoms]

    for eqn in jaxpr.eqns:
        if moved.isdisjoint(eqn.outvars):
            eqns.append(eqn.replace(invars=renamed(eqn.invars)))
        for var in eqn.outvars:
            if var in early:
                eqns.append(early[var])
                names[var] = early[var].outvars[0]
    return jaxpr.replace(eqns=eqns, outvars=renamed(jaxpr.outvars))
