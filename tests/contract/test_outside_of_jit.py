"""Outside of `jit` a clip is one compiled call, which changes nothing but the time."""

import functools
import gc
import itertools
import logging
import weakref

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import sparse
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import helpers
from helpers import oc
from optaxclip import factors, norms

CLIPS = {
    "clip": lambda t: oc.clip(t),
    "clip_by_global_norm": lambda t: oc.clip_by_global_norm(t),
    "clip_by_block_rms": lambda t: oc.clip_by_block_rms(t),
    "adaptive_grad_clip": lambda t: oc.adaptive_grad_clip(t, exclude="head"),
    "normalize_by_update_norm": lambda t: oc.normalize_by_update_norm(t),
    "zero_nonfinite": lambda t: oc.zero_nonfinite(),
    "pair": lambda t: oc.clip_by_value((-t, 2 * t)),
    "mapping": lambda t: oc.clip_by_leaf_norm({"dense": t, "**": jnp.inf}),
    "labels": lambda t: oc.clip_by_group_norm(t, {"kernel": "weights", "**": "rest"}),
    "factor": lambda t: oc.clip_by(norms.global_norm, t, factors.soften),
    "trust_ratio": lambda t: oc.clip_by_trust_ratio(jnp.inf, t),
    "relative_step": lambda t: oc.clip_by_relative_step(t),
}
# A clip of elements, one of norms, a rule, and infinities.
CHOSEN = "clip", "clip_by_global_norm", "adaptive_grad_clip", "mapping"
EVERY = helpers.all_but(CLIPS, CHOSEN)
FLOAT0 = np.zeros(2, jax.dtypes.float0)
NARROW = "float16", "bfloat16", "float32", "float8_e4m3fn"
OWN_SHAPES = {"dense": {"bias": (5,), "kernel": (7, 5)}, "head": {"kernel": (5, 2)}}


@pytest.fixture
def compiled(caplog):
    """Names of the programs that were compiled since it was cleared last."""
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        yield caplog


def names(compiled) -> list[str]:
    texts = [record.getMessage() for record in compiled.records]
    return [text for text in texts if text.startswith("Compiling ")]


@pytest.mark.parametrize("name", EVERY)
def test_a_call_is_one_program_and_another_threshold_compiles_nothing(name, compiled):
    updates = helpers.random_tree(shapes=OWN_SHAPES)
    clip = CLIPS[name](0.5)
    state = clip.init(updates)
    compiled.clear()
    clip.update(updates, state, updates)
    assert len(names(compiled)) == 1
    compiled.clear()
    for threshold in (0.25, 3, np.float64(1e-3)):
        CLIPS[name](threshold).update(updates, state, updates)
    assert names(compiled) == []


def test_a_function_of_a_norm_is_one_program(compiled):
    updates, norm = helpers.random_tree(shapes=OWN_SHAPES), jnp.ones(())
    compiled.clear()
    oc.clip_with_norm(updates, norm, 0.5)
    oc.clip_with_norm(updates, norm, 2)
    assert len(names(compiled)) == 1


@functools.cache
def traced(name):
    return jax.jit(lambda t, *args: CLIPS[name](t).update(*args))


# Bounds of elements are rounded to their dtype; a number for a norm is float32 in each.
QUICK = ("clip_by_global_norm", "bfloat16")
PAIRS = {QUICK, *itertools.product((*CHOSEN, "pair"), NARROW)}
PAIRS |= set(zip(CLIPS, itertools.cycle(NARROW), strict=False))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [pair if pair == QUICK else helpers.thorough(*pair) for pair in sorted(PAIRS)],
)
@hypothesis.given(
    threshold=st.floats(2.0**-10, 2.0**10) | st.sampled_from((1, 1e30, jnp.inf)),
    power=st.integers(-3, 1),
    keep=st.booleans(),
)
def test_it_gives_what_it_gives_under_jit(name, dtype, threshold, power, keep):
    updates = helpers.random_tree(dtype, seed=power + 3, scale=10.0**power)
    clip = CLIPS[name](threshold)
    keep |= name in ("zero_nonfinite", "relative_step")
    args = updates, clip.init(updates) if keep else None, updates
    got, expected = clip.update(*args), traced(name)(float(threshold), *args)
    assert helpers.types(got) == helpers.types(expected)
    helpers.assert_close(got[0], expected[0])
    for ours, right in zip(*map(jax.tree.leaves, (got[1], expected[1])), strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-6)


@pytest.mark.parametrize("name", ["clip", helpers.thorough("clip_by_global_norm")])
def test_it_computes_in_64_bits_where_these_are_on(name):
    narrow = helpers.random_tree("float32")
    CLIPS[name](0.5).update(narrow, None, narrow)
    with jax.enable_x64(True):
        updates = helpers.random_tree("float64")
        clip = CLIPS[name](1 / 3)
        got, _ = clip.update(updates, None, updates)
        expected, _ = jax.jit(clip.update)(updates, None, updates)
    helpers.assert_close(got, expected)


@pytest.mark.parametrize("name", ["clip", "clip_by_global_norm", "zero_nonfinite"])
def test_what_passes_through_is_the_very_object(name):
    passing = {"count": jnp.arange(3), "key": jax.random.key(0), "none": None}
    updates = {"w": jnp.array([3.0, 4.0]), "masked": optax.MaskedNode(), **passing}
    clip = CLIPS[name](1.0)
    state = clip.init(updates)
    out, new = clip.update(updates, state)
    assert jax.tree.structure(out) == jax.tree.structure(updates)
    assert all(out[key] is passing[key] for key in passing)
    if hasattr(state, "scope_ids"):
        assert new.scope_ids is state.scope_ids


@pytest.mark.parametrize("make", [oc.clip, oc.clip_by_global_norm])
def test_without_a_threshold_nothing_is_copied(make):
    updates = {"w": jnp.array([3.0, jnp.nan])}
    out, _ = make(np.float32(np.inf)).update(updates, make(1.0).init(updates))
    assert out["w"] is updates["w"]
    out, _ = make(np.inf).update({"w": np.ones(2)}, None)
    assert isinstance(out["w"], jax.Array)


@pytest.mark.parametrize("leaf", [2.0, np.float32(2.0), np.full(3, 2.0), 7, FLOAT0])
def test_leaves_that_are_no_arrays_of_jax_are_as_ever(leaf, x64):
    out, _ = oc.clip(1e9).update({"a": leaf, "b": jnp.ones(2)}, None)
    if np.result_type(leaf).kind != "f":
        assert out["a"] is leaf
        return
    assert isinstance(out["a"], jax.Array)
    assert out["a"].dtype == ("float32" if isinstance(leaf, float) else leaf.dtype)
    np.testing.assert_array_equal(out["a"], leaf)


def test_under_a_transformation_there_is_no_call_within():
    clip, updates = oc.clip_by_global_norm(1.0), {"w": jnp.ones(3)}
    inside = str(jax.make_jaxpr(clip.update)(updates, clip.init(updates)))
    assert "reduce_sum" in inside
    assert "name=_run" not in inside


def test_a_sparse_array_is_clipped_as_the_dense_one():
    dense = jnp.array([[0.0, 3.0], [-0.5, 0.0]])
    out, _ = oc.clip(1.0).update(sparse.BCOO.fromdense(dense), None)
    np.testing.assert_array_equal(out.todense(), [[0.0, 1.0], [-0.5, 0.0]])


def test_what_a_user_wrote_is_asked_at_every_call():
    now = {"is": 1.0}
    rule = optax.stateless(
        lambda sizes, params: jax.tree.map(lambda x: 0 * x + now["is"], sizes)
    )
    clips = [
        oc.clip_by_value(lambda count: now["is"]),
        oc.clip_by_global_norm({"**": lambda count: now["is"]}),
        oc.clip_by(lambda u: jnp.max(u["w"]) / now["is"], rule),
        oc.clip_by(norms.global_norm, 1.0, lambda norm, limit: now["is"] / norm),
    ]
    updates = {"w": jnp.array([8.0])}
    states = [clip.init(updates) for clip in clips]
    for now["is"], expected in ((1.0, [1, 1, 1, 1]), (2.0, [2, 2, 4, 2])):
        pairs = zip(clips, states, strict=True)
        found = [clip.update(updates, state)[0]["w"].item() for clip, state in pairs]
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_contexts_are_told_apart():
    updates = {"w": jnp.array([[3.0, 4.0], [0.6, 0.8]])}
    clip = oc.clip_by_leaf_norm(1.0)
    layers = oc.over_layers(clip, {"w": 0})
    for _ in range(2):
        together, _ = clip.update(updates, None)
        np.testing.assert_allclose(np.linalg.norm(together["w"]), 1.0, rtol=1e-6)
        apart, _ = layers.update(updates, None)
        np.testing.assert_allclose(apart["w"], [[0.6, 0.8], [0.6, 0.8]], rtol=1e-6)


def test_an_error_is_the_same_and_has_nothing_of_jit():
    clip, updates = oc.clip_by_value((-1.0, 2.0)), {"z": jnp.array([1j])}
    with pytest.raises(ValueError, match=r"complex leaf 'z', got a range") as found:
        clip.update(updates, None)
    assert "Traced" not in str(found.value)
    assert found.value.__context__ is None
    assert not getattr(found.value, "__notes__", [])


def test_a_nan_is_found_where_one_looks_for_it():
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        oc.clip_by_global_norm(1.0).update(jnp.array([jnp.nan]), None)


def test_it_runs_without_jit():
    with jax.disable_jit():
        out, _ = oc.clip(1.0).update({"w": jnp.array([3.0, -4.0])}, None)
    np.testing.assert_array_equal(out["w"], [1.0, -1.0])


@pytest.mark.parametrize(
    ("make", "axis"),
    helpers.in_turn(
        (oc.clip, oc.clip_by_leaf_norm), (AxisType.Auto, AxisType.Explicit)
    ),
)
def test_leaves_that_are_spread_over_devices_stay_so(make, axis):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis, axis))
    specs = PartitionSpec("a", "b"), PartitionSpec(None, "b"), PartitionSpec()
    whole = [jnp.arange(1.0, 65.0).reshape(8, 8) for _ in specs]
    pairs = zip(whole, specs, strict=True)
    updates = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in pairs]
    out, _ = make(1.0).update(updates, make(1.0).init(updates))
    for x, like in zip(out, updates, strict=True):
        assert x.sharding.is_equivalent_to(like.sharding, 2)
    helpers.assert_close(out, make(1.0).update(whole, None)[0])


def test_leaves_on_devices_of_their_own_are_clipped_there():
    first, second = jax.devices()[:2]
    updates = [jax.device_put(jnp.array([3.0]), device) for device in (first, second)]
    out, _ = oc.clip(1.0).update(updates, None)
    assert [x.device for x in out] == [first, second]
    np.testing.assert_array_equal(np.concatenate(out), [1.0, 1.0])


def test_nothing_of_a_clip_is_kept():
    threshold, updates = jnp.array(0.5), jnp.array([3.0, 4.0])
    clip = oc.normalize_by_update_norm(threshold)
    clip.update(updates, None)
    kept = [weakref.ref(threshold), weakref.ref(updates), weakref.ref(clip.update)]
    del clip, threshold, updates
    gc.collect()
    assert [ref() for ref in kept] == [None] * 3
