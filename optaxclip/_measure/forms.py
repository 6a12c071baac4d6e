"""A norm that neither overflows nor underflows, in the form that each platform likes.

All forms give the norm of the updates times a power of two, and that power:

  rescued: one pass, and rare ones over scaled updates. For a CPU, where more sums cost
    more passes and branches are free.
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
    powers as _powers,
    reduce,
    stacks as _stacks,
    units as _units,
)
from optaxclip._measure.units import Packed, Scope
from optaxclip._mesh import collectives, splits as _splits, spread as _spread

# Compute capabilities at which float64 has half the speed of float32.
_DOUBLES = ("6.0", "7.0", "8.0", "9.0", "10.0")


Scaled = Callable[[reduce.Scale], Packed]  # of a power of two


class Plain(NamedTuple):
    """A formula of norms which over- and underflows.

    Attributes:
      scaled: function from updates and a layout to a function from a power of two to
        the norms of the updates times that, of all scopes.
      scopes: which those are.
      axes: the mesh axes over which the norms differ, as those of units may.
      names: function to those of the scopes, where they aren't those of the leaves.
      specs: how the norms are spread over devices where it is known how the leaves are;
        those of units may be.
    """

    scaled: Callable[[Any, layouts.Layout], Scaled]
    scopes: tuple[Scope, ...]
    axes: collectives.Axes = frozenset()
    names: Callable[[], _names.Names] = tuple
    specs: Any = PartitionSpec()

    def norms(self, updates: Any) -> Packed:
        """Returns the norms, which is for updates that are neither large nor small."""

        def laid_out(layout: layouts.Layout) -> Callable[[Any], Packed]:
            return lambda updates: self.scaled(updates, layout)(1.0)

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
        own = formula(updates, splits)
        found = _ours(own, dtype, layout, updates, layouts.ON_TPUS)
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
            scaled = treedef.unflatten(leaves)
            return _scaled(plain, dtype, layouts.AS_THEY_ARE, scaled)(1.0)

        _, change = jax.jvp(at_these, primals, tangents)
        return (norms, powers), (change, jax.tree.map(jnp.zeros_like, powers))

    return exact(updates)


def _ours(
    plain: Plain,
    dtype: Any,
    layout: layouts.Layout,
    updates: Any,
    on_tpu: layouts.Layout = layouts.ON_TPU,
) -> Exact:
    on_gpu = functools.partial(at_three_scales, plain, dtype, layout)
    if dtype == jnp.float32 and _has_fast_doubles():
        on_gpu = functools.partial(in_doubles, plain, layout)
    return jax.lax.platform_dependent(
        updates,
        cpu=functools.partial(rescued, plain, dtype),
        cuda=on_gpu,
        default=functools.partial(at_three_scales, plain, dtype, on_tpu),
    )


def rescued(plain: Plain, dtype: Any, updates: Any) -> Exact:
    at = _scaled(plain, dtype, layouts.ON_CPU, updates)
    # A kernel for each use of them would add up all parts of them anew.
    norms = jax.tree.map(jax.lax.optimization_barrier, at(1.0))
    powers = jax.tree.map(_powers.of, norms)
    every = _powers.anywhere(jax.tree.leaves(powers))
    for scale, needed in zip(_powers.ends(dtype), every, strict=True):
        # All devices take one branch, for there are collectives in it.
        needed = collectives.anywhere(needed, plain.axes)
        # Not known to the compiler, which fills arrays with a number that it knows.
        unknown = jax.lax.optimization_barrier(jnp.asarray(scale, dtype))
        again = functools.partial(_again, at, unknown, powers, norms)
        if isinstance(needed, Tracer):
            norms = jax.lax.cond(needed, again, lambda plain=norms: plain)
        elif needed:
            norms = again()
    return norms, powers


def _again(at: Scaled, scale: Any, powers: Packed, norms: Packed) -> Packed:
    """Returns the norms, measured again where that is the power they are to have."""

    def chosen(power: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
        # Of what is not finite the plain norm says whether it was a NaN.
        return jnp.where((power == scale) & jnp.isfinite(new), new, old)

    return jax.tree.map(chosen, powers, at(scale), norms)


def at_three_scales(
    plain: Plain, dtype: Any, layout: layouts.Layout, updates: Any
) -> Exact:
    norms, down, up = map(
        _scaled(plain, dtype, layout, updates), (1.0, *_powers.ends(dtype))
    )
    powers = jax.tree.map(_powers.of, norms)
    found = jax.tree.map(_powers.pick, powers, norms, down, up), powers
    if isinstance(plain.specs, _units.Units):
        norms, powers = (_units.rejoined(x, plain.specs.places) for x in found)
        return norms, powers
    return found


def in_doubles(plain: Plain, layout: layouts.Layout, updates: Any) -> Exact:
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(_double(x.dtype)), updates)
        norms = plain.scaled(wide, layout)(1.0)
        powers = jax.tree.map(_powers.of_double, norms)
        pairs = jax.tree.map(lambda x, p: (x * p).astype(jnp.float32), norms, powers)
        return pairs, jax.tree.map(lambda p: p.astype(jnp.float32), powers)


def _scaled(plain: Plain, dtype: Any, layout: layouts.Layout, updates: Any) -> Scaled:
    at = plain.scaled(updates, layout)
    return lambda scale: jax.tree.map(lambda x: jnp.asarray(x, dtype), at(scale))


def _double(dtype: Any) -> Any:
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    return jnp.complex128 if is_complex else jnp.float64


def _has_fast_doubles() -> bool:
    """Returns whether the GPU computes in float64 fast; without one, that others do."""
    kind: Any = jax.devices()[0]
    return getattr(kind, "compute_capability", _DOUBLES[0]) in _DOUBLES
