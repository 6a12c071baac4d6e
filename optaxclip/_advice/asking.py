"""With which params and gradients is an optimizer asked, and how does it take a step?

No array has to be large: the params have the structure of the real ones, but at most
two entries along each axis, all of them 1. And where there are many leaves, of those
that are alike to the optimizer one is kept, and the others are empty.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip._trees.leaves import Leaves

SIZES = 0.0, 1e-3, 2e-3  # norms of the gradients
MANY = 16  # leaves; fewer are asked one by one
AHEAD = 2**10, 2**16, 0  # how much later many leaves are compared, and once more

Optimizer = optax.GradientTransformationExtraArgs


def ones(leaves: Leaves, most: int | None) -> Any:
    """Returns params with as many entries along each axis at most, in 32 bits."""
    made = []
    for leaf in leaves.leaves:
        shape = [n if most is None else min(n, most) for n in np.shape(leaf)]
        kind = jax.dtypes.canonicalize_dtype(jnp.result_type(leaf))
        made.append(jnp.ones(shape, kind))
    for i in leaves.counted:
        kind = jnp.complex64 if jnp.iscomplexobj(made[i]) else jnp.float32
        made[i] = made[i].astype(kind)
    return leaves.treedef.unflatten(made)


def alike(optimizer: Optimizer, leaves: Leaves, params: Any) -> np.ndarray:
    """Returns for each leaf that counts the first one with which the same is done.

    Hundreds of layers take a minute to compile, and are all alike. So where there are
    many leaves, those count as alike that have one shape and make the same first steps,
    at the first counts and at later ones.
    """
    seen = np.arange(len(leaves.counted))
    if len(seen) <= MANY:
        return seen
    told = jnp.float32(element(leaves, params, SIZES[1])), jnp.ones(())
    carry, moved = (params, optimizer.init(params), told), []

    def go_on() -> tuple[Any, Any, Any]:
        after, moves = step(optimizer, leaves, carry)
        moved.append(jax.device_get([jnp.ravel(x)[0] for x in moves]))
        return after

    while len(moved) < 2 or (len(moved) < MANY and not np.any(moved)):
        carry = go_on()
    for ahead in AHEAD:
        states = [carry[1]]
        for _ in range(2):
            carry = go_on()
            states.append(carry[1])
        carry = later(carry, states, ahead)
    if not np.any(moved):
        return seen
    shapes = [jax.tree.leaves(params)[i].shape for i in leaves.counted]
    keys = [*zip(shapes, *moved, strict=True)]
    return np.asarray([keys.index(key) for key in keys])


def one_of_each(
    optimizer: Optimizer, leaves: Leaves, params: Any, alike: np.ndarray
) -> tuple[Any, Any]:
    """Empties the leaves that are like an earlier one; returns params and state."""
    found = jax.tree.leaves(params)
    for place, i in enumerate(leaves.counted):
        if alike[place] != place and found[i].ndim:
            found[i] = found[i][:0]
    params = leaves.treedef.unflatten(found)
    return params, start(optimizer, leaves, params)


def element(leaves: Leaves, params: Any, size: Any) -> Any:
    """Returns an element of a gradient that has this norm and all elements equal."""
    found = jax.tree.leaves(params)
    return size / np.sqrt(sum(found[i].size for i in leaves.counted))


def start(optimizer: Optimizer, leaves: Leaves, params: Any) -> Any:
    """Returns a state in the dtypes that it keeps from the first update on."""
    state, update = optimizer.init(params), partial(step, optimizer, leaves)
    told = jnp.zeros(()), jnp.ones(())
    new = jax.eval_shape(update, (params, state, told))[0][1]
    if jax.tree.structure(new) != jax.tree.structure(state):
        return update((params, state, told))[0][1]

    def cast(x: Any, then: Any) -> jax.Array:
        x = jnp.asarray(x)
        return x if x.dtype == then.dtype else x.astype(then.dtype)

    return jax.tree.map(cast, state, new)


def step(optimizer: Optimizer, leaves: Leaves, carry: Any) -> tuple[Any, list[Any]]:
    """Takes a step; returns the carry, and the moves of the leaves that count.

    The loss falls, so that nothing that waits for it reduces the learning rate.
    """
    params, state, (entry, value) = carry
    found = jax.tree.leaves(params)
    grads = [jnp.zeros_like(x) for x in found]
    for i in leaves.counted:
        grads[i] = jnp.full_like(found[i], entry)
    grads = leaves.treedef.unflatten(grads)
    told = {"value": value, "grad": grads, "value_fn": _line_search}
    updates, state = optimizer.update(grads, state, params, **told)
    moves = jax.tree.leaves(updates)
    carry = optax.apply_updates(params, updates), state, (entry, 0.9 * value)
    return carry, [moves[i] for i in leaves.counted]


def _line_search(params: Any) -> Any:
    del params
    raise ValueError(
        "Expected an optimizer whose steps follow from its gradients, got one that"
        " asks for the loss, `value_fn`. A line search finds the length of each step"
        " by itself, whatever the size of the gradient: it needs no clip."
    )


def later(carry: Any, states: list[Any], ahead: Any) -> Any:
    """Moves the counts in a state to later steps: whole numbers that grew twice."""

    def moved(old: Any, before: Any, now: Any) -> Any:
        if not jnp.issubdtype(now.dtype, jnp.integer) or now.dtype.itemsize < 4:
            return now
        if now.ndim != np.ndim(ahead) or not jnp.all((old < before) & (before < now)):
            return now
        return now + jnp.asarray(ahead, now.dtype)

    return carry[0], jax.tree.map(moved, *states), carry[2]
