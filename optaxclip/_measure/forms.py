"""A norm that neither overflows nor underflows, in the form that each platform likes.

All forms give the norm of the updates times a power of two, and that power:

  rescued: one pass, and a rare second one over scaled updates. For a CPU, where more
    sums cost more passes and branches are free.
  at_three_scales: sums of the updates as they are, scaled down and scaled up, in one
    pass. For a TPU, and for what is not known: a branch would cost the compiler's
    fusions.
  in_doubles: one sum of squares in float64, which no float32 overflows. For GPUs that
    compute in float64 at half their speed, which is faster than they read from memory;
    a branch would cost a round trip to the host.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import PartitionSpec

from optaxclip._measure import (
    layouts,
    names as _names,
    stacks as _stacks,
    units as _units,
)
from optaxclip._measure.units import Packed, Scope
from optaxclip._mesh import collectives, splits as _splits, spread as _spread

# Compute capabilities at which float64 has half the speed of float32.
_DOUBLES = ("6.0", "7.0", "8.0", "9.0", "10.0")


class Plain(NamedTuple):
    """A formula of norms which over- and underflows.

    Attributes:
      scaled: function from updates, a power of two (or one for each scope) and a layout
        to the norms of the updates times that, of all scopes.
      scopes: which those are.
      axes: the mesh axes over which the norms differ, as those of units may.
      names: function to those of the scopes, where they aren't those of the leaves.
      specs: how the norms are spread over devices where it is known how the leaves are;
        those of units may be.
    """

    scaled: Callable[[Any, Any, layouts.Layout], Packed]
    scopes: tuple[Scope, ...]
    axes: collectives.Axes = frozenset()
    names: Callable[[], _names.Names] = tuple
    specs: Any = PartitionSpec()

    def norms(self, updates: Any) -> Packed:
        """Returns the norms, which is for updates that are neither large nor small."""

        def laid_out(layout: layouts.Layout) -> Callable[[Any], Packed]:
            return lambda updates: self.scaled(updates, 1.0, layout)

        return jax.lax.platform_dependent(
            updates,
            cpu=laid_out(layouts.ON_CPU),
            cuda=laid_out(layouts.ON_GPU),
            default=laid_out(layouts.AS_THEY_ARE),
        )


Formula = Callable[[Any, _splits.Splits], Plain]  # of updates, and how they are split
Exact = tuple[Packed, Packed]  # the norms of the updates times powers of two, and these


def on_any_platform(plain: Plain, updates: Any, dtype: Any) -> Exact:
    """Returns the exact norms, in a form that the lowering chooses; differentiable."""
    if not any(isinstance(x, Tracer) for x in jax.tree.leaves(updates)):
        return rescued(plain, dtype, updates)
    return jax.lax.platform_dependent(
        updates,
        cpu=functools.partial(rescued, plain, dtype),
        default=functools.partial(at_three_scales, plain, dtype, layouts.AS_THEY_ARE),
    )


def ours_on_any_platform(
    formula: Formula,
    splits: _splits.Splits,
    updates: Any,
    dtype: Any,
    layout: layouts.Layout,
) -> Exact:
    """The same of a formula of this library's, which has a form more.

    Its derivative is that of the norm at the powers that were chosen. Where it is known
    how leaves are spread, every device measures its own pieces of them.
    """
    plain, spread = formula(updates, splits), _spread.of(updates)

    def on_pieces(updates: Any, splits: _splits.Splits) -> Exact:
        found = _ours(formula(updates, splits), dtype, layout, updates)
        if isinstance(plain.specs, _units.Units):
            places = plain.specs.places
            norms, powers = (_units.rejoined(x, places) for x in found)
            return norms, powers
        return found

    @jax.custom_jvp
    def exact(updates: Any) -> Exact:
        if spread is None:
            return _ours(plain, dtype, layout, updates)
        return jax.shard_map(
            functools.partial(on_pieces, splits=spread.splits()),
            mesh=spread.mesh,
            in_specs=(jax.tree.unflatten(jax.tree.structure(updates), spread.specs),),
            out_specs=(plain.specs, plain.specs),
        )(updates)

    @exact.defjvp
    def derivative(primals: tuple[Any], tangents: tuple[Any]) -> Any:
        norms, powers = exact(*primals)
        fixed = jax.lax.stop_gradient(powers)

        def at_these(updates: Any) -> Packed:
            every = _units.of_each(fixed, plain.scopes, _stacks.of(updates, splits))
            leaves, treedef = jax.tree.flatten(updates)
            leaves = [x * power for x, power in zip(leaves, every, strict=True)]
            return _norms(
                plain, dtype, layouts.AS_THEY_ARE, treedef.unflatten(leaves), 1.0
            )

        _, change = jax.jvp(at_these, primals, tangents)
        return (norms, powers), (change, jax.tree.map(jnp.zeros_like, powers))

    return exact(updates)


def _ours(plain: Plain, dtype: Any, layout: layouts.Layout, updates: Any) -> Exact:
    on_gpu = functools.partial(at_three_scales, plain, dtype, layout)
    if dtype == jnp.float32 and _has_fast_doubles():
        on_gpu = functools.partial(in_doubles, plain, layout)
    return jax.lax.platform_dependent(
        updates,
        cpu=functools.partial(rescued, plain, dtype),
        cuda=on_gpu,
        default=functools.partial(at_three_scales, plain, dtype, layouts.ON_TPU),
    )


def rescued(plain: Plain, dtype: Any, updates: Any) -> Exact:
    at = functools.partial(_norms, plain, dtype, layouts.ON_CPU, updates)
    norms = at(1.0)
    powers = jax.tree.map(_power, norms)
    needed = _anywhere([power != 1 for power in jax.tree.leaves(powers)])
    # All devices take one branch, for there are collectives in it.
    needed = collectives.anywhere(needed, plain.axes)
    if isinstance(needed, Tracer):
        return jax.lax.cond(needed, lambda: at(powers), lambda: norms), powers
    return (at(powers) if needed else norms), powers


def at_three_scales(
    plain: Plain, dtype: Any, layout: layouts.Layout, updates: Any
) -> Exact:
    norms, down, up = (
        _norms(plain, dtype, layout, updates, scale) for scale in (1.0, *_ends(dtype))
    )
    powers = jax.tree.map(_power, norms)
    found = jax.tree.map(_pick, powers, norms, down, up), powers
    if isinstance(plain.specs, _units.Units):
        norms, powers = (_units.rejoined(x, plain.specs.places) for x in found)
        return norms, powers
    return found


def in_doubles(plain: Plain, layout: layouts.Layout, updates: Any) -> Exact:
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(_double(x.dtype)), updates)
        norms = plain.scaled(wide, 1.0, layout)
        powers = jax.tree.map(_power_of_double, norms)
        pairs = jax.tree.map(lambda x, p: (x * p).astype(jnp.float32), norms, powers)
        return pairs, jax.tree.map(lambda p: p.astype(jnp.float32), powers)


def _norms(
    plain: Plain, dtype: Any, layout: layouts.Layout, updates: Any, scale: Any
) -> Packed:
    found = plain.scaled(updates, scale, layout)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), found)


def _double(dtype: Any) -> Any:
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    return jnp.complex128 if is_complex else jnp.float64


def _has_fast_doubles() -> bool:
    """Returns whether the GPU computes in float64 fast; without one, that others do."""
    kind: Any = jax.devices()[0]
    return getattr(kind, "compute_capability", _DOUBLES[0]) in _DOUBLES


@jax.custom_batching.custom_vmap
def _anywhere(conditions: list[jax.Array]) -> jax.Array:
    """Returns whether a condition holds, one answer for the whole batch under `vmap`.

    With an answer for each example a `cond` would run both of its branches.
    """
    return functools.reduce(jnp.logical_or, map(jnp.any, conditions))


@_anywhere.def_vmap
def _anywhere_in_batch(
    size: int, batched: Any, conditions: list[jax.Array]
) -> tuple[jax.Array, bool]:
    del size, batched
    return _anywhere(conditions), False


def _ends(dtype: Any) -> tuple[float, float]:
    """Powers of two under which no square of a normal number leaves the range."""
    exponent = jnp.finfo(dtype).maxexp
    return 2.0 ** -(3 * exponent // 4), 2.0 ** (5 * exponent // 8)


@jax.jit
def _power(plain: jax.Array) -> jax.Array:
    """Returns what the updates of a scope have to be multiplied by to be measured."""
    down, up = _ends(plain.dtype)
    low = 2.0 ** (1 - jnp.finfo(plain.dtype).maxexp // 4)  # squares lose elements below
    one = jnp.ones_like(plain)
    power = jnp.where(jnp.isfinite(plain), one, down * one)
    return jax.lax.stop_gradient(jnp.where(plain < low, up * one, power))


@jax.jit
def _power_of_double(norm: jax.Array) -> jax.Array:
    """The same of a norm in float64, with which no float32 has come near an end."""
    down, up = _ends(jnp.float32)
    one = jnp.ones_like(norm)
    power = jnp.where(norm > 2.0**60, down * one, one)
    return jnp.where(norm < 2.0**-30, up * one, power)


@jax.jit
def _pick(
    power: jax.Array, plain: jax.Array, down: jax.Array, up: jax.Array
) -> jax.Array:
    return jnp.where(power > 1, up, jnp.where(power < 1, down, plain))
