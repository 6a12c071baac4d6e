"""What of a step itself is recorded: its loss and its norms."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip import norms
from optaxclip._looking import stretches
from optaxclip._measure import formulas, reduce, scopes as _scopes, units as _units
from optaxclip._mesh import collectives
from optaxclip._trees import infinity, leaves as _leaves, paths as _paths


def columns(
    norm: _scopes.Norm, measured: _scopes.Measured, paths: Sequence[str]
) -> np.ndarray:
    """Returns which norms are columns: not the global one, nor those of no leaf."""
    if isinstance(measured.norms, _units.Units):
        raise ValueError(
            "Expected a norm of all leaves, of each leaf or of groups, got one of"
            " units. Use `norms.leaf_norms`."
        )
    if _units.EVERYTHING in measured.scopes:
        return np.arange(0 if norms.is_partition(norm) else 1)
    excluded, formula = set[int](), norms.formula(norm)
    while isinstance(formula, functools.partial) and "exclude" in formula.keywords:
        matching = _paths.matching(formula.keywords["exclude"], paths, "`exclude`")
        excluded |= {*np.flatnonzero(matching).tolist()}
        formula = norms.formula(formula.keywords["norm"])
    counted = [not excluded.issuperset(scope) for scope in measured.scopes]
    return np.flatnonzero(counted)


def norms_of(norm: _scopes.Norm, leaves: _leaves.Leaves) -> jax.Array:
    """Returns the global norm and those of all scopes."""
    measured = _scopes.measure(norms.formula(norm), leaves)
    own = columns(norm, measured, leaves.paths())
    sizes = jnp.ravel(measured.sizes())
    if norms.is_partition(norm):
        total = _total(sizes)
    else:
        total = _scopes.measure(formulas.global_norm, leaves).sizes()
    sizes = sizes if own.size == sizes.size else sizes[own]  # mostly all of them
    return jnp.concatenate([total[None], sizes])


def is_nonfinite(norm: _scopes.Norm, own: jax.Array) -> jax.Array:
    """Returns whether the loss or a norm is not finite."""
    # The global one is not where another is not.
    looked_at = own[:2] if norms.is_partition(norm) else own
    return ~jnp.all(jnp.isfinite(looked_at))


def _total(sizes: jax.Array) -> jax.Array:
    """Returns the norm of vectors that have these norms."""
    if sizes.size == 1:
        return sizes[0]
    largest = jnp.max(sizes, initial=0)
    unit = jnp.where(jnp.isfinite(largest) & (largest > 0), largest, 1)
    total = unit * reduce.root(jnp.sum(jnp.square(reduce.over(sizes, unit))), 2)
    return jnp.where(jnp.isfinite(largest), infinity.replaced(total), largest)


def loss(extra_args: dict[str, Any], dtype: Any) -> jax.Array:
    """Returns the loss, or what stands for none."""
    value = extra_args.get("value")
    if value is None:
        return jnp.full((), stretches.none(dtype), dtype)
    value = jnp.asarray(value)
    axes = collectives.varying_axes(value)
    if value.shape != () or axes or jnp.iscomplexobj(value):
        raise ValueError(
            "Expected the loss to be one real number, the same on all devices, got"
            f" shape {value.shape}, dtype {value.dtype}, different over the mesh axes"
            f" {sorted(axes)}. Call `jax.lax.pmean` on it, or `jnp.mean`."
        )
    narrow = value.astype(dtype)
    return jnp.where(jnp.isfinite(value), infinity.replaced(narrow), narrow)
