"""Leaves that are no JAX arrays: NumPy's of 64 bits, and sparse ones."""

import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse
from jax.experimental import sparse

import helpers
import table
from helpers import oc
from optaxclip import norms

# --------------------------------------------------------------------------------------
# NumPy leaves of 64 bits, where JAX has 32
# --------------------------------------------------------------------------------------

TRANSFORMATIONS = table.clips | {
    "skip_if_nonfinite": lambda: oc.skip_if_nonfinite(oc.clip_by_global_norm(1.0)),
    "skip_if_spike": lambda: oc.skip_if_spike(oc.clip_by_global_norm(1.0)),
    "zero_nonfinite": oc.zero_nonfinite,
    "unscale": lambda: oc.unscale(2.0),
}


def in_64_bits(tree):
    wide = {"f": np.float64, "c": np.complex128, "i": np.int64}
    return jax.tree.map(lambda x: np.asarray(x, wide[np.asarray(x).dtype.kind]), tree)


def two_steps(tx, updates, params):
    state, found = tx.init(params), []
    for _ in range(2):
        out, state = tx.update(updates, state, params)
        found.append(out)
    return found, state


NO_CLIPS = TRANSFORMATIONS.keys() - table.clips.keys()
KINDS = {"global_norm", "agc", "value", "singular_values", "zclip", "u_clip"} | NO_CLIPS


@pytest.mark.parametrize("name", helpers.all_but(TRANSFORMATIONS, KINDS))
def test_leaves_of_64_bits_are_those_of_32_without_x64(name):
    tree = helpers.random_tree(seed=1)
    params = helpers.random_tree(seed=2)
    tx = TRANSFORMATIONS[name]()
    expected = two_steps(tx, tree, params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = two_steps(tx, in_64_bits(tree), in_64_bits(params))
    chex.assert_trees_all_equal_dtypes(found, expected)
    chex.assert_trees_all_close(found, expected, rtol=1e-6)


@pytest.mark.parametrize("norm", [norms.global_norm, norms.leaf_norms, norms.leaf_rms])
def test_complex_leaves_of_128_bits_are_those_of_64_without_x64(norm):
    updates = {"z": np.array([3 + 4j, 0], np.complex128), "n": np.array([7])}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clipped, state = two_steps(oc.clip_by(norm, 1.0), updates, updates)
    assert {x["z"].dtype for x in clipped} == {jnp.dtype(jnp.complex64)}
    assert state.norms.dtype == jnp.float32
    clipped, _ = oc.clip_by_value(1.0).update(updates, None)
    np.testing.assert_allclose(clipped["z"], [0.6 + 0.8j, 0])


def test_with_x64_they_keep_their_bits(x64):
    updates = {"a": np.array([3.0, 4.0])}
    clipped, _ = oc.clip_by_global_norm(1.0).update(updates, None)
    assert clipped["a"].dtype == jnp.float64


# --------------------------------------------------------------------------------------
# Sparse leaves
# --------------------------------------------------------------------------------------


def rows(*indices, unique):
    data = jnp.array([3.0, 4.0])
    places = jnp.array(indices)[:, None]
    return sparse.BCOO((data, places), shape=(4,), unique_indices=unique)


MAY_REPEAT = {
    "BCOO": lambda: rows(0, 0, unique=False),
    "CSR": lambda: sparse.CSR.fromdense(jnp.eye(2)),
    "COO": lambda: sparse.COO.fromdense(jnp.eye(2)),
}
SOME = {
    "global_norm": lambda: oc.clip_by_global_norm(1.0),
    "value": lambda: oc.clip_by_value(1.0),
    "guard": lambda: oc.skip_if_nonfinite(optax.sgd(0.1)),
    "norm": lambda: optax.stateless(lambda x, _: norms.leaf_norms(x)),
}


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("kind", ["BCOO", "CSR", "COO"])
def test_a_sparse_leaf_whose_rows_may_repeat_raises_with_its_path(name, kind):
    tx, tree = SOME[name](), {"embed": MAY_REPEAT[kind](), "w": jnp.ones(2)}
    message = rf"got {kind} at 'embed'.*todense.*sum_duplicates"
    with pytest.raises(TypeError, match=message):
        jax.eval_shape(lambda u: tx.update(u, tx.init({"w": jnp.ones(2)}))[0], tree)


def test_without_repeated_rows_the_norm_is_that_of_the_whole():
    tree = {"embed": rows(0, 3, unique=True), "w": jnp.zeros(2)}
    assert oc.global_norm(tree) == 5.0 == oc.global_norm(tree["embed"].todense())
    clip = oc.clip_by_global_norm(1.0)
    clipped, _ = jax.jit(clip.update)(tree, clip.init(tree))
    np.testing.assert_allclose(clipped["embed"].todense(), [0.6, 0, 0, 0.8])
    summed = rows(0, 0, unique=False).sum_duplicates(nse=1)
    assert oc.global_norm({"embed": summed}) == 7.0


NEEDS_THE_WHOLE = {
    "rms": (lambda: oc.clip_by_block_rms(1.0), "root mean square"),
    "units": (lambda: oc.clip_by(norms.unit_norms, 1.0), "units"),
    "singular values": (lambda: oc.clip_singular_values(1.0), "singular values"),
    "spectral norm": (lambda: oc.clip_by_spectral_norm(1.0), "singular values"),
}


@pytest.mark.parametrize("name", NEEDS_THE_WHOLE)
def test_what_depends_on_the_whole_shape_refuses_sparse_leaves(name):
    make, what = NEEDS_THE_WHOLE[name]
    clip, tree = make(), {"embed": rows(0, 3, unique=True)}
    with pytest.raises(TypeError, match=rf"dense.*{what}.*BCOO at 'embed'.*todense"):
        jax.eval_shape(lambda u: clip.update(u, clip.init({"embed": 1.0}))[0], tree)


def test_a_sparse_array_of_scipy_raises_with_its_path():
    tree = {"embed": scipy.sparse.csr_array(np.eye(3))}
    with pytest.raises(TypeError, match=r"csr_array at 'embed'"):
        oc.clip_by_global_norm(1.0).update(tree, None)
