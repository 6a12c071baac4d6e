"""What a skipped step must not change beside the params: running statistics."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip._guards import selection
from optaxclip._guards.skips import GuardState


def keep_if_skipped(opt_state: Any, old: Any, new: Any) -> Any:
    """Returns ``old`` where a guard skipped the last step, else ``new``.

    A guard saves parameters and moments. What the forward pass of a bad batch has left
    in running statistics, such as those of BatchNorm, it does not see: there a NaN
    stays for ever, and evaluation is NaN. Call this in the training loop, after the
    update:

    .. code-block:: python

      updates, opt_state = optimizer.update(grads, opt_state, params, value=loss)
      params = optax.apply_updates(params, updates)
      batch_stats = optaxclip.keep_if_skipped(opt_state, batch_stats, new_batch_stats)

    Guarantees:
      * What is returned has the bits of ``old`` or of ``new``, all of it.
      * The guard is found wherever it is in the state; of several, one is enough.

    Args:
      opt_state: state of the optimizer after the step, or anything that holds one.
      old: any tree, as it was before the step.
      new: the same tree, as the step would leave it.

    Returns:
      The tree to go on with. Works under ``jit``; of a state with a batch axis, made by
      ``vmap``, take ``jax.vmap(keep_if_skipped)``.

    Raises:
      ValueError: there is no guard in ``opt_state``, or one with a batch axis, or the
        trees are not alike.

    Examples:
      >>> tx = optaxclip.skip_if_nonfinite(optax.sgd(0.1))
      >>> params = jnp.ones(2)
      >>> mean = jnp.zeros(())  # a running mean
      >>> opt_state = tx.init(params)
      >>> for batch in jnp.array([[1.0, 3.0], [jnp.nan, 3.0]]):
      ...     updates, opt_state = tx.update(batch, opt_state, params)
      ...     new_mean = 0.9 * mean + 0.1 * batch.mean()
      ...     mean = optaxclip.keep_if_skipped(opt_state, mean, new_mean)
      >>> print(f"{mean:.1f}")
      0.2
    """
    found = [_is_skipped(state) for state in _guards(opt_state)]
    if not found:
        raise ValueError(
            "Expected the state of an optimizer with a guard in it, got"
            f" {type(opt_state).__name__} without one. Pass what `tx.update` returned,"
            " where `tx` is `skip_if_nonfinite(...)` or `skip_if_spike(...)`, or has it"
            " in it."
        )
    skip = jnp.any(jnp.stack(found))
    kinds = jax.tree.structure(old), jax.tree.structure(new)
    shapes = [[jnp.shape(x) for x in jax.tree.leaves(some)] for some in (old, new)]
    if kinds[0] != kinds[1] or shapes[0] != shapes[1]:
        raise ValueError(
            "Expected `old` and `new` to be one tree before and after the step, got"
            f" {kinds[0]} of shapes {shapes[0]} and {kinds[1]} of shapes {shapes[1]}."
        )
    return jax.tree.map(lambda a, b: selection.select(skip, a, b), old, new)


def _guards(node: Any) -> Iterator[GuardState]:
    for leaf in jax.tree.leaves(node, is_leaf=lambda x: isinstance(x, GuardState)):
        if isinstance(leaf, GuardState):
            yield leaf
            yield from _guards(leaf.guarded_state)


def _is_skipped(state: GuardState) -> jax.Array:
    # An `nnx.Optimizer` keeps each array in a variable of its own.
    (last,) = jax.tree.leaves(state.last_skipped_step)
    (count,) = jax.tree.leaves(state.step_count)
    if jnp.ndim(last):
        raise ValueError(
            "Expected the state of one optimizer, got a batch axis of shape"
            f" {jnp.shape(last)} in a guard's. Call `jax.vmap(keep_if_skipped)`."
        )
    return (jnp.asarray(last) == jnp.asarray(count) - 1) & (jnp.asarray(last) >= 0)
