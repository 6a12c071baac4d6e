"""How far does an optimizer move the params, for each unit of the gradient's norm?

It is asked: gradients of one direction and size are fed to it for as long as its steps
grow, which is what comes of a long stretch of clipped steps, momentum included. This is
done with gradients of norm 0, for what moves without any (weight decay), and of two
sizes, which tells whether the steps depend on the size at all; and again at later
and later counts, for schedules that begin at 0.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._advice import asking
from optaxclip._advice.asking import SIZES, Optimizer
from optaxclip._trees.leaves import Leaves

COUNTS = 0, *(int(2 ** (power / 2)) for power in range(14, 41))  # up to a million
STEPS = 64  # in a stretch
FIRST, LATER = 8, 64  # stretches at most, at the first counts and at later ones
LONGER = 1.01  # steps that grow less from one doubling to the next have settled
FAST_TO_COMPILE = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}

Stretch = Callable[[Any], tuple[Any, np.ndarray]]


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
    with jax.default_device(_cpu()):
        return _asked(optimizer, leaves)


def _cpu() -> Any:
    """Returns where arrays of a few entries are dealt with fastest, if it is there."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def _asked(optimizer: Optimizer, leaves: Leaves) -> Reach:
    params = asking.ones(leaves, most=2)
    try:
        alike = asking.alike(optimizer, leaves, params)
        params, state = asking.one_of_each(optimizer, leaves, params, alike)
    except Exception:  # it holds arrays of the shapes of the params
        params, alike = asking.ones(leaves, None), np.arange(len(leaves.counted))
        params, state = asking.one_of_each(optimizer, leaves, params, alike)
    elements = asking.element(leaves, params, np.asarray(SIZES, np.float32))
    told = jnp.tile(elements, (len(COUNTS), 1)), _lanes(jnp.ones(()))
    carry, stretch = (*_lanes((params, state)), told), _stretch(optimizer, leaves)
    states, carry, first = _settled(stretch, carry, FIRST)
    ahead = np.tile(np.asarray(COUNTS)[:, None], len(SIZES))
    carry = asking.later(carry, states, ahead)
    longest = np.maximum(first, _settled(stretch, carry, LATER)[2]).max(axis=0)
    sizes = np.asarray([jax.tree.leaves(params)[i].size for i in leaves.counted])
    fed = np.outer(SIZES[1:], np.sqrt(sizes[sizes > 0])) / np.sqrt(sizes.sum())
    lengths = (longest / fed)[:, np.searchsorted(np.flatnonzero(sizes), alike)]
    small, large = np.maximum(lengths[:, lengths[0].argmax()], 1e-30)
    return Reach(lengths[0], 1 + float(np.log2(large / small)))


def _lanes(carry: Any) -> Any:
    """Repeats all arrays for counts and sizes."""
    lanes = len(COUNTS), len(SIZES)
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (*lanes, *x.shape)), carry)


def _stretch(optimizer: Optimizer, leaves: Leaves) -> Stretch:
    """Returns a function that goes on; `carry` to itself and `[counts, sizes, leaves]`.

    The sizes are those above 0, and the moves of size 0 are taken off theirs.
    """
    steps = jax.vmap(partial(asking.step, optimizer, leaves))

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

    def stretch(carry: Any) -> tuple[Any, np.ndarray]:
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
