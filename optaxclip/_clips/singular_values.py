"""The clip of matrices that shortens every direction which is too long."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optaxclip import factors
from optaxclip._arguments import checks, mistakes
from optaxclip._clips import spectra as _spectra
from optaxclip._engine import multiply, state as _state
from optaxclip._engine.clip_by import Rule, decided
from optaxclip._engine.limits import Threshold
from optaxclip._measure import reduce, units as _units
from optaxclip._mesh import summed
from optaxclip._trees import leaves as _leaves


@mistakes.at_most(1, mistakes.ONCE)
def clip_singular_values(
    max_value: Threshold,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips all singular values of every matrix.

    .. math:: U \operatorname{diag}(s) V^\top \leftarrow
      U \operatorname{diag}(\min(s_i, \text{max\_value})) V^\top

    Only the directions that are too long are shortened, where
    :func:`clip_by_spectral_norm` scales the whole matrix down. The decomposition is
    exact and takes far longer than a norm: some 20 products of matrices of that size.

    A matrix is the last two axes of a leaf, and further axes are stacked layers; so a
    convolution has one matrix per position of its kernel. A leaf of rank 0 or 1 has one
    singular value, its norm. Leave out what is meant otherwise by ``optax.masked``.

    Guarantees:
      * Structure, shapes and dtypes of the updates are kept; they are rounded once.
      * A matrix whose largest singular value is within the bound comes back bit for
        bit; zeros stay zeros.
      * Finite matrices are clipped right, whatever their dtype and magnitude.
      * A NaN or an infinity makes its whole matrix NaN.
      * The derivative at a fixed threshold is finite and right also where singular
        values are equal or zero, where that of a decomposition is not.
      * Under ``jit`` a matrix that is spread over devices is gathered; inside
        ``shard_map`` it raises. A stack may be split between its matrices there, by
        :func:`over_axes`; the state is that of all devices.

    Args:
      max_value: largest singular value allowed, in the units of the updates; any
        threshold of :func:`clip_by`, whose norm is the largest singular value. A rule
        with a state needs leaves of rank 2 and less.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` with state :class:`ClipState`,
      one entry per leaf, of its hardest matrix: norms are the largest singular values,
      factors what those were multiplied by.

    Raises:
      TypeError, ValueError: see :func:`clip_by`; a matrix that is split over devices.

    Examples:
      >>> clip = optaxclip.clip_singular_values(1.0)
      >>> grads = {"w": jnp.array([[0.0, 3.0], [-0.5, 0.0]])}
      >>> updates, state = clip.update(grads, clip.init(grads))
      >>> print(updates["w"].round(3), state.norms)
      [[ 0.   1. ]
       [-0.5  0. ]] [3.]

    References:
      Spectral clipping of gradients and updates: `2603.14315
      <https://arxiv.org/abs/2603.14315>`_ and `2605.11838
      <https://arxiv.org/abs/2605.11838>`_, both 2026
    """
    checks.threshold(max_value, "max_value")
    checks.not_off(max_value)

    def init_fn(params: optax.Params) -> _state.ClipState:
        leaves = _leaves.flatten(params, abstract=True)
        zeros, names = _spectra.zeros(leaves), _spectra.names(leaves)
        return _state.fresh(max_value, zeros, leaves, names)

    def update_fn(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        leaves = _leaves.flatten(updates)
        summed.check_summed(leaves, params)
        axes = _spectra.axes(_spectra.splits(leaves))
        every = _spectra.matrices(leaves)
        spectra, units = [], []
        for x in every:
            scaled, unit = _spectra.scaled(jax.lax.stop_gradient(x))
            spectra.append(_decomposed(scaled))
            units.append(unit)
        largest = [s[..., None, :1] for _, s, _ in spectra]
        measured = _spectra.as_norms(largest, units, axes)
        rule = Rule(max_value, factors.rescale)
        found = decided(rule, leaves, measured, state, params, extra_args)
        totals = jax.tree.map(multiply.total, found.scales, found.rests)
        columns = [
            _units.of_leaf(packed, measured.scopes, leaves)
            for packed in (found.max_norms, totals)
        ]
        rows = zip(leaves.counted, every, spectra, units, *columns, strict=True)
        clipped = [_clipped(leaves.leaves[i], *row) for i, *row in rows]
        return leaves.replaced(clipped, found.untouched), found.state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _decomposed(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns U, s and the conjugate transpose of V; of a column without any work."""
    if x.shape[-1] > 1:
        u, s, vh = jnp.linalg.svd(x, full_matrices=False, compute_uv=True)
        return u, s, vh
    size = reduce.root(jnp.sum(reduce.square(x), axis=-2, keepdims=True), 2)
    ones = jnp.ones_like(x[..., :1, :])
    return x / jnp.where(size == 0, 1, size), size[..., 0], ones


def _clipped(
    leaf: Any,
    x: jax.Array,
    spectrum: tuple[jax.Array, jax.Array, jax.Array],
    unit: jax.Array,
    limit: jax.Array,
    factor: jax.Array,
) -> jax.Array:
    is_finite = jnp.isfinite(factor)
    known = jnp.where(is_finite, limit, 0), jnp.where(jnp.isnan(unit), 1, unit)
    rebuilt = _rebuilt(jnp.where(is_finite, x, 0), spectrum, *known)
    rebuilt = jnp.where(is_finite, rebuilt, jnp.nan)
    rebuilt = _spectra.put_like(rebuilt.reshape(jnp.shape(leaf)), leaf)
    result = _leaves.narrow(rebuilt, leaf)
    return jnp.where(factor == 1, jnp.asarray(leaf, result.dtype), result)


@jax.custom_jvp
def _rebuilt(
    x: jax.Array,
    spectrum: tuple[jax.Array, jax.Array, jax.Array],
    limit: jax.Array,
    unit: jax.Array,
) -> jax.Array:
    """Returns x with clipped singular values, given its spectrum in some unit.

    In units of the limit nothing that matters underflows.
    """
    del x
    u, s, vh = spectrum
    bound = limit / unit
    values = s[..., None, :]
    is_below = (values < bound) | (values == 0)
    shares = jnp.where(is_below, values / jnp.where(bound > 0, bound, 1), 1)
    return limit * _product(u * shares, vh)


@_rebuilt.defjvp
def _rebuilt_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """Divides differences of clipped values by those of values: all are in [0, 1]."""
    _, (u, s, vh), limit, unit = primals
    dx, _, d_limit, _ = tangents
    bound = limit / unit
    rows, columns = s[..., :, None], s[..., None, :]
    clipped = jnp.minimum(rows, bound), jnp.minimum(columns, bound)
    by_difference = _quotient(clipped[0] - clipped[1], rows - columns, rows < bound)
    by_sum = _quotient(clipped[0] + clipped[1], rows + columns, bound > 0)
    by_value = _quotient(clipped[1], columns, bound > 0)
    uh, v = _transposed(u), _transposed(vh)
    right, left = _product(dx, v), _product(uh, dx)
    inner = _product(uh, right)
    even, odd = inner + _transposed(inner), inner - _transposed(inner)
    core = (by_difference * even + by_sum * odd) / 2
    outside = _product((right - _product(u, inner)) * by_value, vh)
    outside += _product(u * by_value, left - _product(inner, vh))
    moved = _product(_product(u, core), vh) + outside
    moved += d_limit * _product(u * (columns > bound), vh)
    return _rebuilt(*primals), moved


def _quotient(x: jax.Array, y: jax.Array, else_one: jax.Array) -> jax.Array:
    zero = y == 0
    return jnp.where(zero, else_one, x / jnp.where(zero, 1, y))


def _transposed(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2).conj()


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
