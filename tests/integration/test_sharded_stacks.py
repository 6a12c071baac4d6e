"""Params that are sharded, under jit and inside shard_map and scan."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import helpers
import in_numpy
from helpers import oc
from optaxclip import norms, thresholds
from table import TABLE

# --------------------------------------------------------------------------------------
# 5. Sharded params
# --------------------------------------------------------------------------------------


SHARDED_SHAPES = {
    "dense": {"bias": (16,), "kernel": (8, 16)},
    "head": {"bias": (4,), "kernel": (16, 4)},
}
SPECS = {
    "dense": {"bias": P("model"), "kernel": P("data", "model")},
    "head": {"bias": P(), "kernel": P("model", None)},
}


def mesh():
    auto = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=auto)


def is_spec(x):
    return isinstance(x, P)


def sharded_case():
    updates = helpers.random_tree(seed=1, scale=2.0, shapes=SHARDED_SHAPES)
    params = helpers.random_tree(seed=2, shapes=SHARDED_SHAPES)
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh(), spec), SPECS, is_leaf=is_spec
    )
    return updates, params, shardings


def test_map_params_shards_the_optimizer_and_not_the_clip():
    _, params, shardings = sharded_case()
    tx = optax.chain(
        oc.clip_by(norms.leaf_norms, thresholds.lagged(optax.ema(0.9))),
        optax.adam(0.1),
    )
    replicated = NamedSharding(mesh(), P())
    state_shardings: Any = optax.tree.map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, params),
        shardings,
        transform_non_params=lambda _: replicated,
    )
    clip_shardings, adam_shardings = state_shardings
    assert set(jax.tree.leaves(clip_shardings)) == {replicated}
    assert adam_shardings[0].mu == shardings

    state = jax.jit(tx.init, out_shardings=state_shardings)(params)
    updates, _, _ = sharded_case()
    sharded = jax.device_put(updates, shardings)
    step = jax.jit(tx.update, out_shardings=(shardings, state_shardings))
    _, state = step(sharded, state, jax.device_put(params, shardings))
    expected = [
        in_numpy.vector_norm([x]) for x in helpers.truth(jax.tree.leaves(sharded))
    ]
    np.testing.assert_allclose(state[0].norms, expected, rtol=1e-6)


SHARDED_CLIPS = (
    "value_asymmetric",
    "value_mapping",
    "global_norm",
    "leaf_norm_ord_inf",
    "leaf_norm",
    "layer_norm",
    "block_rms",
    "agc",
    "relative_to_params",
    "lagged_leaf",
)


def two_steps(clip, updates, params):
    """The second step of a history sees the first."""
    state = clip.init(params)
    _, state = clip.update(updates, state, params)
    bigger = jax.tree.map(lambda x: 3 * x, updates)
    return clip.update(bigger, state, params)[0]


@pytest.mark.parametrize("name", SHARDED_CLIPS)
def test_sharded_arrays_give_the_unsharded_result_without_a_gather(name):
    clip = TABLE[name].make()
    updates, params, shardings = sharded_case()
    step = jax.jit(
        functools.partial(two_steps, clip),
        in_shardings=(shardings, shardings),
        out_shardings=shardings,
    )
    compiled = step.lower(updates, params).compile()
    text = compiled.as_text() or ""
    on_mesh = (jax.device_put(updates, shardings), jax.device_put(params, shardings))
    helpers.assert_close(compiled(*on_mesh), two_steps(clip, updates, params))
    assert "all-gather" not in text
    assert "all-to-all" not in text


def test_many_sharded_leaves_share_few_collectives():
    clip = oc.clip_by_global_norm(1.0)
    shapes = {f"layer_{i}": (8, 16) for i in range(20)}
    updates = helpers.random_tree(shapes=shapes)
    sharding = NamedSharding(mesh(), P("data", "model"))
    step = jax.jit(lambda u: clip.update(u, None)[0], in_shardings=sharding)
    text = step.lower(updates).compile().as_text() or ""
    assert "all-gather" not in text
    assert 1 <= text.count("all-reduce(") <= 6  # the plain sum, and two rare rescues


def test_explicit_axes_are_accepted():
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    grid = jax.make_mesh((4, 2), ("data", "model"), axis_types=explicit)
    updates, _, _ = sharded_case()
    clip = oc.clip_by_global_norm(1.0)
    with jax.set_mesh(grid):
        sharded = jax.tree.map(jax.device_put, updates, SPECS, is_leaf=is_spec)
        clipped = jax.jit(lambda u: clip.update(u, None)[0])(sharded)
        assert (
            jax.typeof(clipped["dense"]["kernel"]).sharding.spec
            == SPECS["dense"]["kernel"]
        )
    helpers.assert_close(clipped, clip.update(updates, None)[0])


# --------------------------------------------------------------------------------------
# 6. shard_map and scan
# --------------------------------------------------------------------------------------


MAPPED_CLIPS = (
    "global_norm",
    "global_norm_ord_3",
    "leaf_norm_ord_inf",
    "soften",
    "leaf_norm",
    "layer_norm",
    "block_rms",
    "lagged_leaf",
)


def scanned(clip, steps):
    def body(state, updates):
        updates, state = clip.update(updates, state)
        return state, updates

    first = jax.tree.map(lambda x: x[0], steps)
    state, clipped = jax.lax.scan(body, clip.init(first), steps)
    del state
    return clipped


def stacked_steps(scale=1.0):
    trees = [
        helpers.random_tree(seed=s, scale=scale * (s + 1), shapes=SHARDED_SHAPES)
        for s in range(3)
    ]
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def mapped(clip):
    """The scan inside `shard_map`: leaves split over two axes, over one, and whole."""
    specs = jax.tree.map(lambda spec: P(None, *spec), SPECS, is_leaf=is_spec)
    return jax.jit(
        jax.shard_map(
            functools.partial(scanned, clip),
            mesh=mesh(),
            in_specs=(specs,),
            out_specs=specs,
        )
    )


@pytest.mark.parametrize("name", MAPPED_CLIPS)
def test_inside_shard_map_a_clip_sees_the_whole_update(name):
    clip, steps = TABLE[name].make(), stacked_steps()
    clipped = mapped(clip)(steps)
    helpers.assert_close(clipped, scanned(clip, steps))
    copies = [np.asarray(s.data) for s in clipped["head"]["bias"].addressable_shards]
    assert len(copies) == 8
    assert all(copy.tobytes() == copies[0].tobytes() for copy in copies)


@pytest.mark.parametrize("scale", [1e-25, 1e25], ids=str)
@pytest.mark.parametrize("name", ["global_norm", "layer_norm"])
def test_inside_shard_map_the_whole_range_is_exact(name, scale):
    steps = stacked_steps(scale)
    limit = scale * 2.0
    clip = TABLE[name].make(limit)
    clipped = mapped(clip)(steps)
    last = jax.tree.map(lambda x: x[-1], clipped)
    updates = helpers.truth(jax.tree.map(lambda x: x[-1], steps))
    label = in_numpy.layer if name == "layer_norm" else in_numpy.every_leaf_together
    expected = in_numpy.by_label(label, in_numpy.constant(limit))(updates, updates)
    helpers.assert_close(last, expected)


def test_inside_shard_map_all_scopes_share_one_collective():
    clip = oc.clip_by_leaf_norm(1.0)
    one = jax.tree.map(lambda x: x[0], stacked_steps())
    step = jax.shard_map(
        lambda u: clip.update(u, None)[0],
        mesh=mesh(),
        in_specs=(SPECS,),
        out_specs=SPECS,
    )
    text = jax.jit(step).lower(one).as_text()
    assert "all_gather" not in text
    assert 1 <= text.count("all_reduce") <= 3  # the plain sum, and the rare rescue


def test_where_the_axes_are_unknown_it_raises():
    clip = oc.clip_by_global_norm(1.0)
    updates, _, _ = sharded_case()
    step = jax.shard_map(
        lambda u: clip.update(u, None)[0],
        mesh=mesh(),
        in_specs=(SPECS,),
        out_specs=SPECS,
        check_vma=False,
    )
    with pytest.raises(ValueError, match="check_vma"):
        jax.jit(step)(updates)
