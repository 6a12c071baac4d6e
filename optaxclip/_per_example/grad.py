"""Gradients of a batch in which no example has more than its share.

Not on the engine's update: a gradient of each example goes in, their sum comes out. The
norms, factors and the rescue from over- and underflow are the engine's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optaxclip import factors, norms
from optaxclip._arguments import checks
from optaxclip._engine.multiply import Factor
from optaxclip._measure import scopes as _scopes
from optaxclip._mesh import collectives
from optaxclip._per_example import examples
from optaxclip._trees import leaves as _leaves


class PerExample(NamedTuple):
    """What :func:`per_example_clipped_grad` saw of a batch, padding included.

    Inside ``shard_map`` the arrays are those of the device's own examples, and the
    counts those of all devices.

    Attributes:
      losses: shape ``(batch,)``.
      aux: what ``loss_fn`` returned beside the loss, stacked; None without `has_aux`.
      norms: of each gradient before the clip, shape ``(batch,)`` of a global norm, else
        ``(batch, scopes)``.
      factors: what each was multiplied by, of the same shape; 0 for an example that is
        padding or whose gradient is not finite.
      example_count: examples that are not padding, int32.
      clipped_count: of these, the ones with a norm above its threshold, int32; those
        that are not finite do not count.
      nonfinite_count: of these, the ones whose gradient has a NaN or an infinity.
    """

    losses: jax.Array
    aux: Any
    norms: jax.Array
    factors: jax.Array
    example_count: jax.Array
    clipped_count: jax.Array
    nonfinite_count: jax.Array


def per_example_clipped_grad(
    loss_fn: Callable[..., Any],
    max_norm: examples.MaxNorm,
    *,
    norm: _scopes.Norm = norms.global_norm,
    factor: Factor = factors.rescale,
    mean: bool = True,
    microbatch_size: int | None = None,
    has_aux: bool = False,
    strict: bool = False,
) -> Callable[..., tuple[Any, PerExample]]:
    r"""Returns a function that clips the gradient of every example by itself.

    .. math:: \frac1n \sum_{i=1}^n g_i \cdot \text{factor}(\|g_i\|, \text{max\_norm}),
      \quad g_i = \nabla_\theta\, \text{loss\_fn}(\theta, x_i)

    One bad example then moves the parameters no further than any other: the robust
    gradient of noisy data, and with noise added, of differentially private training.

    Guarantees:
      * What an example contributes has a norm of at most ``max_norm``, to float32
        rounding; with `strict`, exactly. So has what one more example changes in the
        sum, but for the rounding of sums, of which low precision has much.
      * An example whose gradient has a NaN or an infinity contributes 0 and is counted;
        so does padding, uncounted.
      * Every finite gradient is measured exactly, whatever its dtype and magnitude.
        Contributions are added in float32 (float64 where a parameter is), and rounded
        once to the dtypes of the params; with `strict` they stay float32.
      * Inside ``shard_map`` the result is that of the whole batch: parameters that are
        split over devices are measured whole, and contributions are added over the axes
        that split the batch.

    Args:
      loss_fn: function ``loss_fn(params, *example) -> loss`` of one example, without a
        batch axis. What differs from example to example (such as a dropout key) is an
        argument; bind what does not. Inside ``shard_map`` it must not communicate over
        axes that split the batch.
      max_norm: largest norm of a whole gradient, possibly traced. A norm of K leaves or
        groups gives each ``max_norm / sqrt(K)``. Or a mapping from path patterns to
        the largest norm of each scope.
      norm: how to measure a gradient: :func:`optaxclip.norms.global_norm` (DP-SGD),
        :func:`optaxclip.norms.leaf_norms` or :func:`optaxclip.norms.group_norms`.
      factor: what to do about a norm; :func:`optaxclip.factors.auto_s` is AUTO-S.
      mean: divide the sum by the number of examples. Private training adds noise to the
        sum, and divides by a number that does not depend on the data: pass False.
      microbatch_size: examples whose gradients are in memory at the same time; None for
        all.
      has_aux: ``loss_fn`` returns a pair ``(loss, aux)``.
      strict: lower the threshold by the rounding of the arithmetic (4e-6), and don't
        round the result to a lower precision than float32, so that noise can be added
        before that.

    Returns:
      A function ``(params, *batch, where=None) -> (grads, PerExample)``. The arrays of
      ``batch`` have a leading batch axis; ``where``, of shape ``(batch,)``, is False
      for padding. ``grads`` have the structure, shapes and dtypes of ``params``.

    Raises:
      TypeError: when building, ``loss_fn`` or ``norm`` is not a function, or
        ``max_norm`` neither a number nor a mapping to numbers.
      ValueError: when building, a negative or NaN threshold, another norm, or a
        microbatch below 1;
        when tracing, batch axes that disagree, and inside ``shard_map``, params split
        over an axis that splits the batch, a loss summed over it, or no types.

    Examples:
      >>> def loss_fn(params, x, y):
      ...     return (params["w"] * x - y) ** 2 / 2
      >>> params = {"w": jnp.array(0.0)}
      >>> x, y = jnp.array([1.0, 1.0, 1.0]), jnp.array([0.5, 0.5, -100.0])
      >>> grad_fn = optaxclip.per_example_clipped_grad(loss_fn, max_norm=1.0)
      >>> grads, seen = grad_fn(params, x, y)
      >>> print(grads["w"], seen.norms, seen.clipped_count)
      0.0 [  0.5   0.5 100. ] 1

      Differential privacy: the sum, noise in proportion to its sensitivity, then a
      division that does not depend on the data.

      >>> grad_fn = optaxclip.per_example_clipped_grad(loss_fn, 1.0, mean=False)
      >>> grads, _ = grad_fn(params, x, y)
      >>> privatizer = optax.add_noise(0.64, 0.0, jax.random.key(0))  # variance
      >>> noised, _ = privatizer.update(grads, privatizer.init(grads))
      >>> mean = jax.tree.map(lambda g: g / 3, noised)

      With JAX-Privacy, whose noise takes the bound for a sensitivity, and which knows
      what that amounts to:

      .. code-block:: python

        privatizer = jax_privacy.noise_addition.gaussian_privatizer(
            stddev=noise_multiplier * max_norm, prng_key=key
        )

    References:
      Abadi et al., `Deep Learning with Differential Privacy
      <https://arxiv.org/abs/1607.00133>`_, 2016; McMahan et al., `Learning
      Differentially Private Recurrent Language Models
      <https://arxiv.org/abs/1710.06963>`_, 2017
    """
    checks.function(loss_fn, "loss_fn")
    rule = examples.Rule(norm, factor, examples.limits_of(max_norm, strict))
    examples.check(rule, max_norm, microbatch_size)
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=has_aux)

    def clipped_grad(
        params: Any, *batch: Any, where: ArrayLike | None = None
    ) -> tuple[Any, PerExample]:
        real = examples.real(where, examples.batch_size(batch))
        axes, splits = examples.spread(params, batch)
        # Else autodiff would add up the gradients of all devices before the clip.
        own = jax.tree.map(lambda x: collectives.vary_over(x, axes), params)

        def of_one(*example: Any) -> tuple[Any, examples.Example]:
            values, grads = value_and_grad(own, *example)
            examples.check_own(values[0] if has_aux else values, axes)
            return values, examples.clipped(rule, splits, grads)

        def microbatch(real: jax.Array, batch: Any) -> tuple[Any, Any]:
            values, example = jax.vmap(of_one)(*batch)
            return examples.added(example, real), (values, example._replace(shares=()))

        leaves = _leaves.flatten(params)
        zeros = [
            collectives.vary_over(jnp.zeros_like(x), axes) for x in leaves.measured()
        ]
        sums, (values, example) = examples.by_microbatches(
            microbatch, zeros, real, batch, microbatch_size
        )
        loss, aux = values if has_aux else (values, None)
        seen = PerExample(loss, aux, *examples.statistics(example, real, axes))
        if axes:
            sums = jax.lax.psum(sums, tuple(sorted(axes)))
        if mean:
            count = jnp.maximum(seen.example_count, 1).astype(leaves.dtype)
            sums = [x / count for x in sums]
        wide = leaves.replaced(leaves.measured())
        return examples.rounded_like(wide if strict else params, sums), seen

    return clipped_grad
