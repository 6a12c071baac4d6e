"""What `carry_over` takes along, what it leaves, and what it refuses."""

import re
from typing import Any

import flax.linen as nn
import flax.training.train_state
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import helpers
from carry_cases import (
    ADAM,
    MASK,
    OPTIMIZERS,
    clipped,
    guarded_and_recorded,
    trained,
)
from helpers import oc
from optaxclip import norms, thresholds

PARAMS = helpers.random_tree(seed=9)

every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def values(state, key):
    return [x for _, x in optax.tree.get_all_with_path(state, key)]


def used(optimizer, params=PARAMS):
    """A state in which every count is 1, and that knows its scopes."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x if "scope_ids" in str(path) else x + jnp.ones_like(x),
        optimizer.init(params),
    )


def assert_same(actual, expected):
    """The same arrays: nothing was copied."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    assert all(x is y for x, y in pairs)


# --------------------------------------------------------------------------------------
# What is taken along
# --------------------------------------------------------------------------------------


@every_optimizer
def test_a_state_comes_back_as_it_was(make):
    """To our clips and back, and with a guard and a record for some time."""
    old = used(make(optax))
    for new in make(oc), guarded_and_recorded(make(optax)):
        carried = oc.carry_over(old, new.init(PARAMS))
        assert helpers.types(carried) == helpers.types(new.init(PARAMS))
        assert_same(oc.carry_over(carried, make(optax).init(PARAMS)), old)


@every_optimizer
def test_of_the_same_optimizer_all_is_taken(make):
    tx = guarded_and_recorded(make(oc))
    old = used(tx)
    assert_same(oc.carry_over(old, tx.init(PARAMS)), old)


@pytest.mark.parametrize("name", helpers.all_but(OPTIMIZERS, ["chain", "MultiSteps"]))
def test_a_run_goes_on_as_if_nothing_had_changed(name):
    make = OPTIMIZERS[name]
    params, old = trained(make(optax))
    expected, _ = trained(make(optax), 3, old, params)
    for new in make(oc), guarded_and_recorded(make(oc)):
        got, _ = trained(new, 3, oc.carry_over(old, new.init(PARAMS)), params)
        helpers.assert_close(got, expected, rtol=1e-5)


CHANGES: dict[str, tuple[Any, Any]] = {
    "a clip where there was none": (ADAM, clipped(oc)),
    "a clip more": (clipped(optax), optax.chain(oc.clip(0.5), clipped(oc))),
    "a clip behind": (ADAM, optax.chain(ADAM, oc.clip(0.5))),
    "a clip between": (
        optax.chain(optax.trace(0.9), optax.scale_by_adam()),
        optax.chain(optax.trace(0.9), oc.clip(0.5), optax.scale_by_adam()),
    ),
    "a named clip more": (
        optax.named_chain(("adam", ADAM)),
        optax.named_chain(("clip", oc.clip(0.5)), ("adam", ADAM)),
    ),
    "one with a memory of elements": (clipped(optax), optax.chain(oc.acclip(), ADAM)),
    "a clip in another wrapper": (
        clipped(optax),
        optax.chain(oc.u_clip(oc.clip(0.5)), oc.reset_momentum(ADAM)),
    ),
    "a guard around a part": (
        clipped(optax),
        optax.chain(oc.clip(0.5), oc.skip_if_spike(ADAM)),
    ),
    "a guard inside": (
        optax.MultiSteps(ADAM, 2).gradient_transformation(),
        optax.MultiSteps(oc.skip_if_nonfinite(ADAM), 2).gradient_transformation(),
    ),
    "a guard instead of Optax's": (
        optax.apply_if_finite(clipped(optax), 3),
        oc.skip_if_nonfinite(clipped(oc)),
    ),
    "zeros instead of NaN": (
        optax.chain(optax.zero_nans(), ADAM),
        optax.chain(oc.zero_nonfinite(), ADAM),
    ),
    "a clip of some leaves": (
        ADAM,
        optax.chain(optax.masked(oc.clip_by_leaf_norm(1.0), MASK), ADAM),
    ),
    "a record of a guard": (oc.skip_if_nonfinite(ADAM), guarded_and_recorded(ADAM)),
    "the other way round": (guarded_and_recorded(ADAM), oc.skip_if_nonfinite(ADAM)),
}


@pytest.mark.parametrize(("old", "new"), CHANGES.values(), ids=CHANGES)
def test_all_but_clips_guards_and_records_is_taken_along(old, new):
    state = used(old)
    there = oc.carry_over(state, new.init(PARAMS))
    back = oc.carry_over(there, old.init(PARAMS))
    assert helpers.types(there) == helpers.types(new.init(PARAMS))
    for one in there, back:
        assert all(x == 1 for x in values(one, "count"))
        for key in "mu", "nu", "acc_grads", "trace":
            expected = [x for _, x in optax.tree.get_all_with_path(state, key)]
            assert_same(
                [x for _, x in optax.tree.get_all_with_path(one, key)], expected
            )


def test_what_a_clip_saw_is_taken_along_where_the_clip_stays():
    rule = thresholds.mean_plus_std(3.0, decay=0.9)
    learnt, leaves = oc.clip_by_global_norm(rule), oc.clip_by_leaf_norm(1.0)
    old = used(optax.chain(learnt, ADAM, leaves))
    new = optax.chain(oc.clip(0.5), learnt, oc.record(ADAM, size=4), leaves)
    carried = oc.carry_over(old, new.init(PARAMS))
    assert_same((carried[1], carried[3]), (old[0], old[2]))
    assert carried[0].update_count == 0


def test_a_clip_takes_the_place_of_one_between_the_same_others():
    """The one before the momentum is not the one behind it."""
    clip = oc.clip_by_global_norm(1.0)
    old = used(optax.chain(clip, optax.trace(0.9), optax.scale(-0.1)))
    new = optax.chain(optax.trace(0.9), clip, optax.scale(-0.1))
    assert oc.carry_over(old, new.init(PARAMS))[1].update_count == 0


def test_of_two_clips_alike_each_keeps_its_own():
    clip = oc.clip_by_global_norm(1.0)
    tx = optax.chain(clip, clip, optax.scale(-0.1))
    first, second = used(clip), clip.init(PARAMS)
    carried = oc.carry_over((first, second, optax.ScaleState()), tx.init(PARAMS))
    assert_same(carried[:2], (first, second))


def test_as_many_scopes_are_not_the_same_scopes():
    """Two leaves in one layer, and two layers in one leaf each: two norms."""
    params = {"a": {"x": jnp.ones(2), "y": jnp.ones(2)}, "b": {"x": jnp.ones(2)}}
    one = optax.masked(oc.clip_by_leaf_norm(1.0), {"a": True, "b": False})
    old = used(one, params)
    assert old.inner_state.update_count == 1
    new = oc.clip_by_group_norm(1.0)
    same = optax.masked(oc.clip_by_leaf_norm(2.0), {"a": True, "b": False})
    fresh = oc.carry_over(old.inner_state, new.init(params))
    assert fresh.norms.shape == old.inner_state.norms.shape
    assert fresh.update_count == 0
    assert oc.carry_over(old, same.init(params)).inner_state.update_count == 1


def test_a_record_with_other_columns_begins_anew():
    old = used(oc.record(ADAM, size=4))
    new = oc.record(clipped(oc), size=4).init(PARAMS)
    carried = oc.carry_over(old, new)
    assert_same(carried.memory, new.memory)
    assert_same(optax.tree.get(carried, "mu"), optax.tree.get(old, "mu"))


def test_a_record_of_as_many_columns_of_others_begins_anew():
    """Three of a global norm and two of each leaf, in another order."""
    clips = oc.clip(0.5), oc.clip_by_global_norm(1.0)
    old = used(oc.record(optax.chain(*clips, ADAM), size=4))
    new = oc.record(optax.chain(*clips[::-1], ADAM), size=4).init(PARAMS)
    assert old.memory.shape == new.memory.shape
    assert_same(oc.carry_over(old, new).memory, new.memory)
    with_guard = oc.record(oc.skip_if_nonfinite(optax.chain(*clips, ADAM)), size=4)
    assert_same(oc.carry_over(old, with_guard.init(PARAMS)).memory, old.memory)


# --------------------------------------------------------------------------------------
# Around and inside of other things
# --------------------------------------------------------------------------------------


def test_a_train_state_is_taken_along_as_a_whole():
    apply = nn.Dense(1).apply
    create = flax.training.train_state.TrainState.create
    old = create(apply_fn=apply, params=used(optax.trace(1.0)).trace, tx=clipped(optax))
    new = create(apply_fn=None, params=PARAMS, tx=guarded_and_recorded(clipped(oc)))
    carried = oc.carry_over(old.replace(step=3, opt_state=used(old.tx)), new)
    assert (carried.step, carried.tx, carried.apply_fn) == (3, new.tx, None)
    assert_same(carried.params, old.params)
    assert all(x == 1 for x in values(carried.opt_state, "count"))


def test_an_nnx_optimizer_goes_on_with_another():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    old = nnx.Optimizer(model, optax.trace(0.9), wrt=nnx.Param)
    old.update(model, grads)
    tx = oc.skip_if_nonfinite(optax.chain(oc.clip(0.5), optax.trace(0.9)))
    new = nnx.Optimizer(model, tx, wrt=nnx.Param)
    new.opt_state = oc.carry_over(old.opt_state, new.opt_state)
    assert all(jnp.all(x == 1) for x in jax.tree.leaves(values(new.opt_state, "trace")))
    new.update(model, grads)
    assert all(jnp.all(x > 1) for x in jax.tree.leaves(values(new.opt_state, "trace")))


def test_lookahead_keeps_what_its_fast_optimizer_had():
    def make(m) -> Any:
        return optax.lookahead(clipped(m), 2, 0.5)

    params = optax.LookaheadParams.init_synced(PARAMS)
    _, old = make(optax).update(PARAMS, make(optax).init(params), params)
    carried = oc.carry_over(old, make(oc).init(params))
    assert carried.steps_since_sync == 1
    assert_same(carried.fast_state[1], old.fast_state[1])


def test_it_works_on_shapes_alone():
    old = jax.eval_shape(clipped(optax).init, PARAMS)
    new = jax.eval_shape(guarded_and_recorded(clipped(oc)).init, PARAMS)
    assert helpers.types(oc.carry_over(old, new)) == helpers.types(new)


def test_it_works_inside_of_jit():
    old = used(clipped(optax))
    new = clipped(oc).init(PARAMS)
    compiled, eager = jax.jit(oc.carry_over)(old, new), oc.carry_over(old, new)
    assert helpers.bits(compiled) == helpers.bits(eager)


def test_arrays_keep_their_shardings():
    mesh = Mesh(jax.devices(), ("data",))
    split = NamedSharding(mesh, PartitionSpec("data"))
    params = {"w": jax.device_put(jnp.ones((8, 2)), split)}
    old = jax.jit(clipped(optax).init, out_shardings=None)(params)
    old = jax.device_put(old, jax.tree.map(lambda x: split if x.ndim else None, old))
    carried = oc.carry_over(old, jax.jit(clipped(oc).init)(params))
    assert optax.tree.get(carried, "mu")["w"].sharding == split
    jax.jit(clipped(oc).update)(params, carried, params)


# --------------------------------------------------------------------------------------
# What it refuses
# --------------------------------------------------------------------------------------

SOME = {"a": jnp.ones(2), "b": jnp.ones(2)}
FIRST, SECOND = {"a": True, "b": False}, {"a": False, "b": True}

REFUSED: dict[str, tuple[Any, Any, str]] = {
    "lost": (
        optax.adam(0.1),
        optax.sgd(0.1),
        "a place in the new state for the ScaleByAdamState at '0' of the old one",
    ),
    "lost behind others": (
        optax.chain(oc.clip(1.0), optax.trace(0.9), optax.scale_by_adam()),
        optax.trace(0.9),
        "a place in the new state for the ScaleByAdamState at '2' of the old one",
    ),
    "missing": (
        optax.sgd(0.1),
        oc.skip_if_nonfinite(optax.sgd(0.1, momentum=0.9)),
        "in the old state for the TraceState at 'guarded_state/0' of the new one",
    ),
    "another optimizer": (
        optax.adam(0.1),
        optax.adabelief(0.1),
        "in the old state the ScaleByBeliefState at '0', got the ScaleByAdamState",
    ),
    "a dtype": (
        optax.adam(0.1),
        optax.chain(oc.clip(1.0), optax.adam(0.1, mu_dtype=jnp.bfloat16)),
        "'1/0/mu/a' to be bfloat16 in the old state, got float32 at '0/mu/a'",
    ),
    "hyperparameters": (
        optax.inject_hyperparams(optax.adam)(0.1),
        optax.adam(0.1),
        "in the old state the ScaleByAdamState at '0', got the Inject",
    ),
    "another mask": (
        optax.masked(optax.trace(0.9), FIRST),
        optax.masked(optax.trace(0.9), SECOND),
        "in the old state the MaskedNode at 'inner_state/trace/a', got the",
    ),
    "a label": (
        optax.partition(
            {"x": optax.trace(1.0), "y": optax.trace(1.0)}, {"a": "x", "b": "y"}
        ),
        optax.partition({"x": optax.trace(1.0)}, {"a": "x", "b": "x"}),
        "a place in the new state for the MaskedState at 'inner_states/y' of the old",
    ),
}


@pytest.mark.parametrize(("old", "new", "message"), REFUSED.values(), ids=REFUSED)
def test_what_can_not_be_matched_raises(old, new, message):
    remedy = ".*Restore the old state with `old_optimizer.init"
    with pytest.raises(ValueError, match=re.escape(message) + remedy):
        oc.carry_over(old.init(SOME), new.init(SOME))


def test_another_shape_raises():
    old, new = (optax.trace(0.9).init({"w": jnp.ones(n)}) for n in (2, 3))
    message = r"'trace/w' to be of shape \(3,\) in the old state, got of shape \(2,\)"
    with pytest.raises(ValueError, match=message):
        oc.carry_over(old, new)


def test_in_a_list_of_layers_a_masked_one_keeps_its_place():
    """Both are one array and one hole: their order tells them apart."""
    old, new = (
        optax.masked(optax.trace(0.9), mask).init([jnp.ones(2), jnp.ones(2)])
        for mask in ([True, False], [False, True])
    )
    with pytest.raises(ValueError, match="the MaskedNode at 'inner_state/trace/0'"):
        oc.carry_over(old, new)


def test_a_state_without_its_types_raises():
    """What a library restores without a template: dictionaries and lists."""
    restored = {"0": {}, "1": {"mu": SOME, "nu": SOME}}
    with pytest.raises(ValueError, match=r"has \['dict'\].*as the template"):
        oc.carry_over(restored, clipped(oc).init(SOME))


def test_norms_of_leaves_are_not_taken_for_a_global_one():
    old = used(oc.clip_by(norms.leaf_norms, 1.0))
    new = oc.clip_by_global_norm(1.0).init(PARAMS)
    assert oc.carry_over(old, new).update_count == 0
