"""ACClip: a momentum that clips itself, element by element."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip._arguments import checks
from optaxclip._measure import reduce
from optaxclip._mesh import summed
from optaxclip._thresholds import moments as _moments
from optaxclip._trees import leaves as _leaves, memories


class AcclipState(NamedTuple):
    """State of :func:`acclip`: two trees like the params, float32 or wider.

    Attributes:
      momentum: means of the elements.
      max_values: means of their moduli, real.
    """

    momentum: Any
    max_values: Any


def acclip(
    b1: ArrayLike = 0.9, b2: ArrayLike = 0.99, eps: ArrayLike = 1e-5
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps a momentum and clips its elements by their mean modulus: ACClip.

    .. math::
      m &\leftarrow b_1 m + (1 - b_1) \, g, \qquad
      \tau \leftarrow b_2 \tau + (1 - b_2) \, |g| \\
      u &= m \cdot \min(1, \tau / (|m| + \text{eps}))

    It takes the place of the momentum of an optimizer: ``optax.chain(acclip(),
    optax.scale_by_learning_rate(1e-3))``. For gradients with heavy tails, in every
    coordinate its own, as those of attention models.

    Guarantees:
      * Structure, shapes and dtypes of the updates are kept; they are rounded once.
      * No element is larger than :math:`\tau`, up to rounding; zeros stay zeros until
        there was a gradient.
      * A NaN or an infinity makes this element NaN, and enters neither mean. The other
        elements don't notice. Complex elements are clipped by their modulus.

    As in the paper neither mean is corrected for its start at zero; so the first update
    is a hundredth of the gradient. Its exponent :math:`\alpha` is 1 here, as in the
    paper's experiments.

    Args:
      b1: decay of the momentum, at least 0 and below 1.
      b2: decay of the threshold.
      eps: added to the modulus of the momentum, in the units of the updates.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` with state :class:`AcclipState`.

    Raises:
      TypeError: an argument that is not a number.
      ValueError: a number out of its range; when tracing, a state of other params.

    Examples:
      >>> tx = optaxclip.acclip(b1=0.5, b2=0.75, eps=0.0)
      >>> state = tx.init(jnp.zeros(1))
      >>> for grad in 4.0, 4.0, 40.0:  # m = 2, 3, 21.5 and tau = 1, 1.75, 11.3125
      ...     updates, state = tx.update(jnp.array([grad]), state)
      ...     print(updates)
      [1.]
      [1.75]
      [11.3125]

    References:
      Zhang et al., `Why are Adaptive Methods Good for Attention Models?
      <https://arxiv.org/abs/1912.03194>`_, 2020
    """
    checks.decay(b1, "b1")
    checks.decay(b2, "b2")
    checks.number(eps, "eps")

    def init_fn(params: optax.Params) -> AcclipState:
        leaves = _leaves.flatten(params, abstract=True)
        return AcclipState(memories.zeros(leaves), memories.real_zeros(leaves))

    def update_fn(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, AcclipState]:
        del extra_args
        checks.needed_state(state, AcclipState)
        leaves = _leaves.flatten(updates)
        summed.check_summed(leaves, params)
        weights = [jnp.asarray(1 - b, leaves.dtype) for b in (b1, b2)]
        floor = jnp.asarray(eps, leaves.dtype)
        olds = [memories.recalled(x, leaves) for x in state]
        rows = zip(leaves.measured(), *olds, strict=True)
        moved = [_averaged(*row, *weights) for row in rows]
        pairs = zip(leaves.counted, moved, strict=True)
        clipped = [_tamed(leaves.leaves[i], *means, floor) for i, means in pairs]
        return leaves.replaced(clipped), AcclipState(
            memories.remembered(state.momentum, [m for m, _ in moved]),
            memories.remembered(state.max_values, [tau for _, tau in moved]),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@jax.jit
def _averaged(
    update: jax.Array,
    momentum: jax.Array,
    max_value: jax.Array,
    weight: jax.Array,
    threshold_weight: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    finite = jnp.isfinite(update)
    means = (
        _moments.mean(momentum, update, weight),
        _moments.mean(max_value, jnp.abs(update), threshold_weight),
    )
    return (
        jnp.where(finite, means[0], momentum),
        jnp.where(finite, means[1], max_value),
    )


@jax.jit
def _tamed(
    leaf: Any, momentum: jax.Array, max_value: jax.Array, eps: jax.Array
) -> jax.Array:
    size = jnp.abs(momentum) + eps
    ratio = reduce.over(max_value, jnp.where(size == 0, 1, size))
    clipped = momentum * jnp.minimum(ratio, 1)
    return _leaves.narrow(jnp.where(jnp.isfinite(leaf), clipped, jnp.nan), leaf)
