"""From arrays to the norm of each scope: the sums of powers behind every norm."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from optaxclip import _mesh

_SMALL = 4096  # elements; smaller leaves of a scope are reduced together

Reduce = Callable[[jax.Array], jax.Array]


def scope_norms(
    leaves: Sequence[jax.Array], scopes: Sequence[int], ord: float
) -> list[jax.Array]:
    """Returns the norms of the scopes 0, 1, ...; ``scopes`` has each leaf's."""
    _mesh.check_axes_are_known()
    if ord == 1:
        return _totals(leaves, scopes, lambda x: jnp.sum(_modulus(x)), jnp.sum)
    if ord == 2:
        return [
            root(s, 2)
            for s in _totals(leaves, scopes, lambda x: jnp.sum(square(x)), jnp.sum)
        ]
    largest = _totals(leaves, scopes, lambda x: jnp.max(_modulus(x)), jnp.max)
    if ord == jnp.inf:
        return largest
    units = [_unit(x) for x in largest]
    shrunk = [x / units[scope] for x, scope in zip(leaves, scopes, strict=True)]
    sums = _totals(shrunk, scopes, lambda x: jnp.sum(_modulus(x) ** ord), jnp.sum)
    return [unit * root(s, ord) for unit, s in zip(units, sums, strict=True)]


def kept_norm(x: jax.Array, axes: tuple[int, ...], ord: float) -> jax.Array:
    """Returns the norm along ``axes``, which are kept with size 1."""
    if ord == 1:
        return jnp.sum(_modulus(x), axis=axes, keepdims=True)
    if ord == 2:
        return root(jnp.sum(square(x), axis=axes, keepdims=True), 2)
    largest = jnp.max(_modulus(x), axis=axes, keepdims=True)
    if ord == jnp.inf:
        return largest
    unit = _unit(largest)
    return unit * root(
        jnp.sum(_modulus(x / unit) ** ord, axis=axes, keepdims=True), ord
    )


def square(x: jax.Array) -> jax.Array:
    """Returns the square of the modulus, real."""
    return (
        jnp.square(x.real) + jnp.square(x.imag)
        if jnp.iscomplexobj(x)
        else jnp.square(x)
    )


def root(x: jax.Array, ord: float) -> jax.Array:
    """Returns ``x ** (1 / ord)``, with derivative 0 at 0."""
    zero = x == 0
    positive = jnp.where(zero, 1, x)
    return jnp.where(zero, 0, jnp.sqrt(positive) if ord == 2 else positive ** (1 / ord))


def _modulus(x: jax.Array) -> jax.Array:
    return root(square(x), 2) if jnp.iscomplexobj(x) else jnp.abs(x)


def _unit(largest: jax.Array) -> jax.Array:
    """What to measure in, so that no power of a modulus overflows or underflows."""
    usable = jnp.isfinite(largest) & (largest > 0)
    return jax.lax.stop_gradient(jnp.where(usable, largest, 1))


def _totals(
    leaves: Sequence[jax.Array],
    scopes: Sequence[int],
    reduce: Reduce,
    combine: Callable[..., jax.Array],
) -> list[jax.Array]:
    """Reduces every leaf and combines the results by scope, over devices too."""
    parts: dict[int, dict[_mesh.Axes, list[jax.Array]]] = {}
    for scope, axes, leaf in _joined(leaves, scopes):
        parts.setdefault(scope, {}).setdefault(axes, []).append(reduce(leaf))
    totals = [
        {
            axes: some[0] if len(some) == 1 else combine(jnp.stack(some))
            for axes, some in p.items()
        }
        for _, p in sorted(parts.items())
    ]
    every = {axes for total in totals for axes in total}
    if not frozenset[str]().union(*every):
        return [total[frozenset()] for total in totals]
    zero = jnp.zeros((), next(iter(totals[0].values())).dtype)
    vectors = {
        axes: jnp.stack([total.get(axes, zero) for total in totals]) for axes in every
    }
    return list(
        _mesh.all_devices(vectors, jax.lax.psum if combine is jnp.sum else jax.lax.pmax)
    )


def _joined(
    leaves: Sequence[jax.Array], scopes: Sequence[int]
) -> list[tuple[int, _mesh.Axes, jax.Array]]:
    """Concatenates the small leaves of a scope: one kernel for all of them.

    Only what is surely on one device, for anything else would be gathered. A TPU
    reduces small leaves together by itself.
    """
    small: dict[tuple[int, _mesh.Axes, jnp.dtype], list[jax.Array]] = {}
    rest = []
    join = jax.default_backend() != "tpu"
    for scope, leaf in zip(scopes, leaves, strict=True):
        axes = _mesh.varying_axes(leaf)
        if join and leaf.size < _SMALL and _mesh.is_local(leaf):
            small.setdefault((scope, axes, leaf.dtype), []).append(leaf)
        else:
            rest.append((scope, axes, leaf))
    return rest + [
        (
            scope,
            axes,
            some[0] if len(some) == 1 else jnp.concatenate([x.ravel() for x in some]),
        )
        for (scope, axes, _), some in small.items()
    ]
