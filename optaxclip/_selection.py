"""How is a step undone without a copy of the state it began with?

Each entry of the new state is selected where it is computed, and what follows, the
updates too, goes by the selected one. If the step is taken, that is the same; if not,
the updates are not used. Selected at the end, the state of before is still needed for
the params when the new state is written over it, at least on a CPU, where either has a
loop of its own: then all of it is copied.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend import core


@jax.jit  # one equation, whatever the types
def _select(skip: Any, old: Any, new: Any) -> jax.Array:
    return jnp.where(skip, old, new)


def take(
    step: Callable[[], tuple[Any, Any]], state: Any, skip: jax.Array
) -> tuple[Any, Any]:
    """Takes a step, unless it is to be skipped.

    Args:
      step: function that returns updates and the new state.
      state: the state of before.
      skip: whether to skip the step, boolean.

    Returns:
      Updates, which mean nothing if the step is skipped, and the state that is kept.
    """

    def selected() -> tuple[Any, Any]:
        updates, new = step()
        return updates, jax.tree.map(lambda a, b: _select(skip, a, b), state, new)

    if not isinstance(skip, Tracer):
        return selected()  # nothing is compiled
    closed, shapes = jax.make_jaxpr(selected, return_shape=True)()
    jaxpr = _select_early(closed.jaxpr, len(jax.tree.leaves(shapes[1])))
    outputs = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, closed.consts))()
    return jax.tree.unflatten(jax.tree.structure(shapes), outputs)


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
