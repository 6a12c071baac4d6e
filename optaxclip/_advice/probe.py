"""How far does an optimizer move the params, for each unit of the gradient's norm?

It is asked: gradients of one direction and size are fed to it for as long as its steps
grow, which is what comes of a long stretch of clipped steps, momentum included. This is
done with gradients of norm 0, for what moves without any (weight decay), and of two
sizes, which tells whether the steps depend on the size at all; and again at later
and later counts, for schedules that begin at 0.

No array has to be large for that: the params that it is asked with have the structure
of the real ones, but at most two entries along each axis, all of them 1.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip._trees.leaves import Leaves

SIZES = 0.0, 1e-3, 2e-3  # norms of the gradients
COUNTS = 0, *(int(2 ** (power / 2)) for power in range(14, 41))  # up to a million
STEPS = 64  # in a stretch
FIRST, LATER = 8, 64  # stretches at most, at the first counts and at later ones
MANY = 16  # leaves; fewer are asked one by one
AHEAD = 2**10, 2**16, 0  # how much later many leaves are compared, and once more
LONGER = 1.01  # steps that grow less from one doubling to the next have settled
FAST_TO_COMPILE = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}

Optimizer = optax.GradientTransformationExtraArgs
Stretch = Callable[[Any], tuple[Any, jax.Array]]


class Reach(NamedTuple):
    """What became of unit gradients.

    Attributes:
      lengths: of the longest step of each leaf that counts, for each unit of the norm
        of its gradient, `[leaves]`; 0 where it is frozen.
      exponent: 1 where steps are as long as gradients are large, 0 where the size of
        the gradients makes no difference.
    """

    lengths: np.ndarray
    exponent: float


def reach(optimizer: Optimizer, leaves: Leaves) -> Reach:
    """Asks an optimizer, outside of ``jit``, with params like these leaves."""
    params = _ones(leaves, most=2)
    try:
        kin = _kin(optimizer, leaves, params)
        params, state = _one_of_each(optimizer, leaves, params, kin)
    except Exception:  # it holds arrays of the shapes of the params
        kin = np.arange(len(leaves.counted))
        params, state = _one_of_each(optimizer, leaves, _ones(leaves, None), kin)
    elements = _element(leaves, params, np.asarray(SIZES, np.float32))
    told = jnp.tile(elements, (len(COUNTS), 1)), _lanes(jnp.ones(()))
    carry, stretch = (*_lanes((params, state)), told), _stretch(optimizer, leaves)
    states, carry, first = _settled(stretch, carry, FIRST)
    ahead = np.tile(np.asarray(COUNTS)[:, None], len(SIZES))
    carry = carry[0], jax.tree.map(partial(_advanced, ahead), *states), carry[2]
    longest = np.maximum(first, _settled(stretch, carry, LATER)[2]).max(axis=0)
    sizes = np.asarray([jax.tree.leaves(params)[i].size for i in leaves.counted])
    fed = np.outer(SIZES[1:], np.sqrt(sizes[sizes > 0])) / np.sqrt(sizes.sum())
    lengths = (longest / fed)[:, np.searchsorted(np.flatnonzero(sizes), kin)]
    small, large = np.maximum(lengths[:, lengths[0].argmax()], 1e-30)
    return Reach(lengths[0], 1 + float(np.log2(large / small)))


def _ones(leaves: Leaves, most: int | None) -> Any:
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


def _kin(optimizer: Optimizer, leaves: Leaves, params: Any) -> np.ndarray:
    """Returns for each leaf that counts the first one with which the same is done.

    Hundreds of layers take a minute to compile, and are all alike. So where there are
    many leaves, those count as alike that have one shape and make the same first steps,
    at the first counts and at later ones.
    """
    seen = np.arange(len(leaves.counted))
    if len(seen) <= MANY:
        return seen
    told = jnp.float32(_element(leaves, params, SIZES[1])), jnp.ones(())
    carry, moved = (params, optimizer.init(params), told), []

    def step() -> tuple[Any, Any, Any]:
        after, moves = _step(optimizer, leaves, carry)
        moved.append(jax.device_get([jnp.ravel(x)[0] for x in moves]))
        return after

    while len(moved) < 2 or (len(moved) < MANY and not np.any(moved)):
        carry = step()
    for ahead in AHEAD:
        states = [carry[1]]
        for _ in range(2):
            carry = step()
            states.append(carry[1])
        carry = carry[0], jax.tree.map(partial(_advanced, ahead), *states), carry[2]
    if not np.any(moved):
        return seen
    shapes = [jax.tree.leaves(params)[i].shape for i in leaves.counted]
    keys = [*zip(shapes, *moved, strict=True)]
    return np.asarray([keys.index(key) for key in keys])


def _one_of_each(
    optimizer: Optimizer, leaves: Leaves, params: Any, kin: np.ndarray
) -> tuple[Any, Any]:
    """Empties the leaves that are like an earlier one; returns params and state."""
    found = jax.tree.leaves(params)
    for place, i in enumerate(leaves.counted):
        if kin[place] != place and found[i].ndim:
            found[i] = found[i][:0]
    params = leaves.treedef.unflatten(found)
    return params, _start(optimizer, leaves, params)


def _element(leaves: Leaves, params: Any, size: Any) -> Any:
    """Returns an element of a gradient that has this norm and all elements equal."""
    found = jax.tree.leaves(params)
    return size / np.sqrt(sum(found[i].size for i in leaves.counted))


def _start(optimizer: Optimizer, leaves: Leaves, params: Any) -> Any:
    """Returns a state in the dtypes that it keeps from the first update on."""
    state, step = optimizer.init(params), partial(_step, optimizer, leaves)
    told = jnp.zeros(()), jnp.ones(())
    new = jax.eval_shape(step, (params, state, told))[0][1]
    if jax.tree.structure(new) != jax.tree.structure(state):
        return step((params, state, told))[0][1]

    def cast(x: Any, then: Any) -> jax.Array:
        x = jnp.asarray(x)
        return x if x.dtype == then.dtype else x.astype(then.dtype)

    return jax.tree.map(cast, state, new)


def _lanes(carry: Any) -> Any:
    """Repeats all arrays for counts and sizes."""
    lanes = len(COUNTS), len(SIZES)
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (*lanes, *x.shape)), carry)


def _step(optimizer: Optimizer, leaves: Leaves, carry: Any) -> tuple[Any, list[Any]]:
    """Takes a step; returns the carry, and the moves of the leaves that count.

    The loss falls, so that nothing that waits for it reduces the learning rate.
    """
    params, state, (element, value) = carry
    found = jax.tree.leaves(params)
    grads = [jnp.zeros_like(x) for x in found]
    for i in leaves.counted:
        grads[i] = jnp.full_like(found[i], element)
    grads = leaves.treedef.unflatten(grads)
    told = {"value": value, "grad": grads, "value_fn": _line_search}
    updates, state = optimizer.update(grads, state, params, **told)
    moves = jax.tree.leaves(updates)
    carry = optax.apply_updates(params, updates), state, (element, 0.9 * value)
    return carry, [moves[i] for i in leaves.counted]


def _line_search(params: Any) -> Any:
    del params
    raise ValueError(
        "Expected an optimizer whose steps follow from its gradients, got one that"
        " asks for the loss, `value_fn`. A line search finds the length of each step"
        " by itself, whatever the size of the gradient: it needs no clip."
    )


def _stretch(optimizer: Optimizer, leaves: Leaves) -> Stretch:
    """Returns a function that goes on; `carry` to itself and `[counts, sizes, leaves]`.

    The sizes are those above 0, and the moves of size 0 are taken off theirs.
    """
    steps = jax.vmap(partial(_step, optimizer, leaves))

    def step(carry: Any, _: None) -> tuple[Any, list[jax.Array]]:
        carry, moves = steps(carry)
        moves = [x for x in moves if x.size]
        drifts = [jnp.where(jnp.isfinite(x[:1]), x[:1], 0) for x in moves]
        ways = [x[1:] - drift for x, drift in zip(moves, drifts, strict=True)]
        return carry, [jnp.linalg.norm(x.reshape(len(x), -1), axis=1) for x in ways]

    @partial(jax.jit, compiler_options=FAST_TO_COMPILE)
    @jax.vmap
    def run(carry: Any) -> tuple[Any, list[jax.Array]]:
        carry, lengths = jax.lax.scan(step, carry, length=STEPS)
        return carry, [x.max(axis=0) for x in lengths]

    def stretch(carry: Any) -> tuple[Any, jax.Array]:
        carry, lengths = run(carry)
        return carry, np.stack(jax.device_get(lengths), axis=-1)

    return stretch


def _settled(
    stretch: Stretch, carry: Any, most: int
) -> tuple[list[Any], Any, np.ndarray]:
    """Goes on until the steps grow no more.

    Returns the states before the last two stretches and now, the carry, and the longest
    steps. Whether they grow is asked after 2, 4, 8, ... stretches, for some optimizers
    move the params at few steps only.
    """
    states, longest, before = [carry[1]], np.zeros(()), 0.0
    for count in range(1, most + 1):
        carry, lengths = stretch(carry)
        states = [*states[-2:], carry[1]]
        if not np.isfinite(lengths).all():
            break  # params that grow with their own size
        longest = np.maximum(longest, lengths)
        if count & (count - 1) == 0:
            if count > 1 and 0 < longest.max() <= LONGER * before:
                break
            before = longest.max()
    return [states[0], *states[-2:]], carry, longest


def _advanced(ahead: Any, old: Any, before: Any, now: Any) -> Any:
    """Moves a count to later steps: a whole number that grew in both stretches."""
    if not jnp.issubdtype(now.dtype, jnp.integer) or now.dtype.itemsize < 4:
        return now
    if now.ndim != np.ndim(ahead) or not jnp.all((old < before) & (before < now)):
        return now
    return now + jnp.asarray(ahead, now.dtype)
