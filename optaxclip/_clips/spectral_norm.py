"""The clip of matrices that scales each down as a whole."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optaxclip import factors
from optaxclip._arguments import checks, mistakes
from optaxclip._clips import spectra as _spectra
from optaxclip._engine import state as _state
from optaxclip._engine.clip_by import Rule, clipped
from optaxclip._engine.limits import Threshold
from optaxclip._measure import reduce
from optaxclip._mesh import collectives, side_by_side, splits as _splits, summed
from optaxclip._trees import leaves as _leaves

_MIXED_IN = 1e-2  # of the start vector, at every step


class SpectralNormState(NamedTuple):
    """What :func:`clip_by_spectral_norm` keeps beside its statistics.

    Attributes:
      vectors: for every matrix, the direction in which it is longest, of norm 1; all
        of them in one vector, of complex ones the real parts before the imaginary.
      rule_state: state of the threshold's rule.
    """

    vectors: jax.Array
    rule_state: Any


@mistakes.at_most(2, mistakes.ONCE)
def clip_by_spectral_norm(
    max_norm: Threshold, num_steps: ArrayLike = 4
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales every matrix so that its spectral norm is at most ``max_norm``.

    .. math:: u \leftarrow u \cdot \min(1, \text{max\_norm} / s_{\max}(u))

    Each matrix keeps its direction. The largest singular value is estimated by power
    iteration, which starts where it ended at the last update: a few products with a
    vector instead of a decomposition. What is a matrix is said in
    :func:`clip_singular_values`.

    The estimate comes from below, so what is clipped may be above ``max_norm`` by its
    error. On matrices that change slowly, as those of a momentum do, it is right to a
    thousandth after some updates. On one of normal noise, where singular values lie
    closest, a first step with 4 steps finds 90 % and with 16 steps 98 %. The start is a
    fixed vector of normal noise. A hundredth of it is mixed in at every update, so
    that a direction which was absent before is found when it appears; while one slowly
    overtakes another, the estimate was 7 % low for some updates.

    Guarantees: those of :func:`clip_by_leaf_norm`, for each matrix by itself; but
    inside ``shard_map`` a matrix that is split over devices raises, and one that is
    spread over explicit mesh axes is gathered. A stack may be split between its
    matrices, by :func:`over_axes`: every device then has the state of all of them, for
    a sum of their vectors over devices at each update. A step at which a matrix is
    zero, or has a NaN or an infinity, leaves its vector as it was. The derivative takes
    the vector for a constant, as it is at the maximum.

    Args:
      max_norm: largest spectral norm; any threshold of :func:`clip_by`. A rule with a
        state needs leaves of rank 2 and less.
      num_steps: steps of the power iteration at every update, each two products with a
        vector.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` with state :class:`ClipState`,
      one entry per leaf, of its hardest matrix, and a :class:`SpectralNormState` for
      the state of the rule.

    Raises:
      TypeError, ValueError: see :func:`clip_by`; ``num_steps`` below 1; no state; a
        matrix that is split over devices.

    Examples:
      >>> clip = optaxclip.clip_by_spectral_norm(1.0)
      >>> grads = {"w": jnp.array([[0.0, 2.0], [-0.5, 0.0]])}
      >>> updates, state = clip.update(grads, clip.init(grads))
      >>> print(updates["w"].round(3), state.norms.round(3))
      [[ 0.    1.  ]
       [-0.25  0.  ]] [2.]

    References:
      Miyato et al., `Spectral Normalization for Generative Adversarial Networks
      <https://arxiv.org/abs/1802.05957>`_, 2018, for the iteration
    """
    checks.threshold(max_norm, "max_norm")
    checks.not_off(max_norm)
    _check_steps(num_steps)

    def init_fn(params: optax.Params) -> _state.ClipState:
        leaves = _leaves.flatten(params, abstract=True)
        zeros, names = _spectra.zeros(leaves), _spectra.names(leaves)
        state = _state.fresh(max_norm, zeros, leaves, names)
        starts = _starts(leaves, _spectra.splits(leaves))
        kept = SpectralNormState(_joined(starts, leaves), state.rule_state)
        return state._replace(rule_state=kept)

    def update_fn(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        checks.needed_state(state, _state.ClipState)
        leaves = _leaves.flatten(updates)
        summed.check_summed(leaves, params)
        splits = _spectra.splits(leaves)
        every = [_spectra.scaled(x) for x in _spectra.matrices(leaves)]
        olds = _parts(state.rule_state, leaves, splits)
        pairs = zip(every, olds, strict=True)
        vectors = [_longest(x, old, num_steps) for (x, _), old in pairs]
        triples = zip(every, vectors, strict=True)
        sizes = [_size(_times(x, v))[..., None] for (x, _), v in triples]
        units = [unit for _, unit in every]
        measured = _spectra.as_norms(sizes, units, _spectra.axes(splits))
        own = state._replace(rule_state=state.rule_state.rule_state)
        rule = Rule(max_norm, factors.rescale)
        new_updates, new = clipped(rule, leaves, measured, own, params, extra_args)
        whole = _of_all_devices(vectors, splits)
        kept = SpectralNormState(_joined(whole, leaves), new.rule_state)
        return new_updates, new._replace(rule_state=kept)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_steps(num_steps: ArrayLike) -> None:
    is_int = isinstance(num_steps, int | np.integer) and not isinstance(num_steps, bool)
    if isinstance(num_steps, checks.STATIC) and (not is_int or num_steps < 1):
        raise ValueError(f"Expected num_steps >= 1, an int, got {num_steps!r}.")


def _start(x: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns the first vector of every matrix of a leaf."""
    size = x.shape[-1] if len(x.shape) > 1 else 1
    noise = jax.random.normal(jax.random.key(0), (size,), jnp.finfo(x.dtype).dtype)
    vector = noise / _size(noise)
    return jnp.broadcast_to(vector, (*x.shape[:-2], size)).astype(x.dtype)


def _starts(leaves: _leaves.Leaves, splits: _splits.Splits) -> list[jax.Array]:
    """Returns the first vectors of all leaves, also of what other devices have."""
    pairs = zip(leaves.abstract(), splits, strict=True)
    whole = [(split.whole_shape(x.shape), x.dtype) for x, split in pairs]
    return [_start(jax.ShapeDtypeStruct(*some)) for some in whole]


def _of_all_devices(
    vectors: list[jax.Array], splits: _splits.Splits
) -> list[jax.Array]:
    """Returns vectors of which each device has those of its own matrices, whole."""
    axes = [split.axes for split in splits]
    placed = [
        collectives.in_place(v, split.whole_shape(v.shape), split.dimensions or ())
        if split.axes
        else v
        for v, split in zip(vectors, splits, strict=True)
    ]
    whole = [frozenset[str]()] * len(placed)
    return side_by_side.each_over(placed, axes, whole, jax.lax.psum)


def _joined(vectors: list[jax.Array], leaves: _leaves.Leaves) -> jax.Array:
    """Returns one real vector: a state must not have the structure of the params."""
    flat = [x.ravel() for v in vectors for x in _reals(v)]
    return jnp.concatenate([jnp.zeros(0, leaves.dtype), *flat])


def _reals(v: jax.Array) -> tuple[jax.Array, ...]:
    return (v.real, v.imag) if jnp.iscomplexobj(v) else (v,)


def _parts(
    state: Any, leaves: _leaves.Leaves, splits: _splits.Splits
) -> list[jax.Array]:
    """Returns the vectors of all leaves, of split ones those of this device.

    Raises:
      ValueError: they are those of other params, or there are none.
    """
    shapes = jax.eval_shape(lambda: [_reals(v) for v in _starts(leaves, splits)])
    sizes = [x.size for pair in shapes for x in pair]
    joined = getattr(state, "vectors", jnp.zeros(0))
    if joined.shape != (sum(sizes),):
        raise ValueError(
            f"Expected a state with vectors of {sum(sizes)} elements, got"
            f" {joined.shape}: it belongs to another clip or to other params. Call"
            " `state = clip.init(params)`."
        )
    flat = iter(jnp.split(joined, np.cumsum(sizes)[:-1]) if sizes else [])
    pairs = [[next(flat).reshape(x.shape) for x in pair] for pair in shapes]
    whole = [x[0] if len(x) == 1 else jax.lax.complex(*x) for x in pairs]
    every = zip(whole, splits, leaves.abstract(), strict=True)
    return [
        collectives.own_piece(v, (*x.shape[:-2], v.shape[-1]), split.dimensions or ())
        if split.axes
        else v
        for v, split, x in every
    ]


def _longest(x: jax.Array, old: jax.Array, num_steps: ArrayLike) -> jax.Array:
    """Returns the direction in which each matrix is longest, or nearly."""
    x = jax.lax.stop_gradient(x)
    start = _start(jax.ShapeDtypeStruct(x.shape, old.dtype))

    def step(_: Any, v: jax.Array) -> jax.Array:
        return _unit(_times(_adjoint(x), _unit(_times(x, v))))

    new = jax.lax.fori_loop(0, num_steps, step, _unit(old + _MIXED_IN * start))
    return jnp.where(_size(new) > 0, new, old)


def _unit(v: jax.Array) -> jax.Array:
    size = _size(v)
    return v / jnp.where(size == 0, 1, size)


def _size(v: jax.Array) -> jax.Array:
    return reduce.root(jnp.sum(reduce.square(v), axis=-1, keepdims=True), 2)


def _times(x: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.einsum("...mn,...n->...m", x, v, precision=jax.lax.Precision.HIGHEST)


def _adjoint(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2).conj()
