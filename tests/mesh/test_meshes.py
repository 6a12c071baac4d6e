"""One meaning on every mesh: what a clip owes where leaves are spread over devices."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import helpers
import table
from helpers import oc
from layouts import LAYOUTS, SCALES, case, grid
from table import KINDS, clips, every_clip

UNITS = ("unit_norm", "agc", "agc_excluding")  # their splits types can't tell
MATRICES = ("singular_values", "spectral_norm")  # of whole leaves: see test_matrices
SETTINGS = ("auto", "explicit", "shard_map", "shard_map_without_types")


def is_spec(x):
    return isinstance(x, P)


def first_step(clip, updates, params):
    return clip.update(updates, clip.init(params), params)


@functools.cache
def unsharded(name):
    return jax.jit(lambda u, p, t: first_step(table.clips[name](t), u, p))


def state_specs(name, specs):
    """What is like the params in a state is split like them."""
    clip = table.clips[name]()
    return optax.tree.map_params(
        clip,
        lambda _, spec: spec,
        jax.eval_shape(clip.init, case()[1]),
        specs,
        transform_non_params=lambda _: P(),
    )


@functools.cache
def sharded(name, setting, layout):
    """The clip's first step in one setting, a function of whole arrays."""
    specs = LAYOUTS[layout]
    mesh = grid(AxisType.Explicit if setting == "explicit" else AxisType.Auto)

    def step(updates, params, t):
        clip = table.clips[name](t)
        if name in UNITS or setting == "shard_map_without_types":
            clip = oc.over_axes(clip, specs)
        return first_step(clip, updates, params)

    if setting.startswith("shard_map"):
        step = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(specs, specs, P()),
            out_specs=(specs, state_specs(name, specs)),
            check_vma=setting == "shard_map",
        )
    compiled = jax.jit(step)

    def run(updates, params, t):
        def put(tree):
            shardings = jax.tree.map(
                lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec
            )
            return jax.device_put(tree, shardings)

        with jax.set_mesh(mesh):
            return compiled(put(updates), put(params), t)

    return run


def assert_same_everywhere(tree):
    """Every device that holds a part holds the same bits of it."""
    for leaf in jax.tree.leaves(tree):
        parts = {}
        for shard in leaf.addressable_shards:
            parts.setdefault(str(shard.index), set()).add(
                np.asarray(shard.data).tobytes()
            )
        assert all(len(copies) == 1 for copies in parts.values())


def check(name, setting, layout):
    if name in MATRICES and setting.startswith("shard_map"):
        layout = "replicated"
    for scale in SCALES:
        updates, params = case(scale)
        t = jnp.float32(scale)
        expected, state = unsharded(name)(updates, params, t)
        clipped, new_state = sharded(name, setting, layout)(updates, params, t)
        helpers.assert_close(clipped, expected, of=name)
        chex.assert_trees_all_close(new_state, state, rtol=1e-6)
        assert_same_everywhere((clipped, new_state))


# --------------------------------------------------------------------------------------
# Every clip of the table
# --------------------------------------------------------------------------------------


BLIND = {"user_norm": "no type says whether a norm of one's own sums over devices"}


# The rows whose norms no kind has, too. Others differ in what follows: a setting each.
IN_ALL = {*KINDS, *table.NORMS_OF_THEIR_OWN}
IN_TURN = set(zip(KINDS, itertools.cycle(SETTINGS[:3]), strict=False))
REST, PAIRS = sorted({*clips} - IN_ALL), set(itertools.product(IN_ALL, SETTINGS[:3]))
PAIRS |= set(zip(REST, itertools.cycle(SETTINGS[:3]), strict=False))


@pytest.mark.parametrize(
    ("name", "setting"),
    [pair if pair in IN_TURN else helpers.thorough(*pair) for pair in sorted(PAIRS)],
)
def test_a_sharded_update_is_clipped_as_on_one_device(name, setting):
    check(name, setting, "mixed")


@every_clip(BLIND)
def test_specs_stand_in_for_types(name):
    check(name, "shard_map_without_types", "mixed")


SOME = [
    ("global_norm", "shard_map"),
    ("global_norm", "shard_map_without_types"),
    ("layer_norm", "shard_map"),
    ("block_rms", "shard_map_without_types"),
    ("agc", "shard_map"),
    ("agc", "explicit"),
]


@pytest.mark.parametrize(
    ("some", "layout"), helpers.in_turn(SOME, list(LAYOUTS)[1:]), ids=str
)
def test_every_layout(some, layout):
    name, setting = some
    check(name, setting, layout)


def test_gradients_of_sharded_params_inside_shard_map():
    """Gathered for the forward pass, reduced and scattered on the way back."""
    specs, mesh = LAYOUTS["one_axis"], grid()
    _, params = case()
    batch = jnp.arange(32.0).reshape(8, 4) / 32

    def gather(x, spec):
        return jax.lax.all_gather(x, "data", axis=tuple(spec).index("data"), tiled=True)

    def loss(params, x):
        whole = jax.tree.map(gather, params, specs)
        hidden = jnp.tanh(x @ whole["head"]["kernel"] + whole["dense"]["bias"])
        return jnp.sum((hidden @ whole["dense"]["kernel"]) ** 2)

    def step(params, x):
        grads = jax.grad(loss)(params, x)
        clip = oc.clip_by_global_norm(1.0)
        return clip.update(grads, clip.init(params), params)

    def whole_loss(params, x):
        hidden = jnp.tanh(x @ params["head"]["kernel"] + params["dense"]["bias"])
        return jnp.sum((hidden @ params["dense"]["kernel"]) ** 2)

    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(specs, P(("data", "model"))),
        out_specs=(specs, P()),
    )
    clip = oc.clip_by_global_norm(1.0)
    expected = clip.update(jax.grad(whole_loss)(params, batch), clip.init(params))
    clipped, state = jax.jit(mapped)(params, batch)
    chex.assert_trees_all_close(clipped, expected[0], atol=1e-6)
    np.testing.assert_allclose(state.norms, expected[1].norms, rtol=1e-6)
    assert state.factors < 0.5


@pytest.mark.parametrize("name", ["global_norm", "layer_norm", "agc"])
def test_shard_map_over_some_axes_only(name):
    """The compiler sees to the others."""
    own = {"dense": {"bias": P(), "kernel": P("data")}, "head": {"kernel": P()}}
    clip, mesh = oc.over_axes(table.clips[name](), LAYOUTS["mixed"]), grid()
    if name != "agc":
        clip = table.clips[name]()  # types tell
    mapped = jax.shard_map(
        lambda u, p: first_step(clip, u, p)[0],
        mesh=mesh,
        in_specs=(own, own),
        out_specs=own,
        axis_names={"data"},
    )
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), LAYOUTS["mixed"], is_leaf=is_spec
    )
    updates, params = case()
    found = jax.jit(mapped)(*jax.device_put((updates, params), (shardings, shardings)))
    helpers.assert_close(found, first_step(table.clips[name](), updates, params)[0])


def test_inside_scan_the_state_of_units_is_a_valid_carry():
    specs, mesh = LAYOUTS["mixed"], grid()
    clip = oc.over_axes(oc.adaptive_grad_clip(0.1), specs)

    def steps(updates, params):
        def body(state, _):
            clipped, state = clip.update(updates, state, params)
            return state, clipped

        return jax.lax.scan(body, clip.init(params), None, length=2)[0]

    mapped = jax.shard_map(steps, mesh=mesh, in_specs=(specs, specs), out_specs=P())
    state = jax.jit(mapped)(*case())
    expected = unsharded_state(oc.adaptive_grad_clip(0.1))
    np.testing.assert_allclose(state.norms, expected.norms, rtol=1e-6)
    assert list(state.clipped_count) == [2, 2, 2]


@pytest.mark.parametrize("place", [0, -1])
def test_the_state_of_units_shows_the_nan_of_any_device(place):
    specs, mesh = LAYOUTS["mixed"], grid()
    clip = oc.over_axes(oc.adaptive_grad_clip(0.1), specs)
    updates, params = case()
    kernel = updates["dense"]["kernel"].at[place, place].set(jnp.nan)
    updates = updates | {"dense": updates["dense"] | {"kernel": kernel}}
    mapped = jax.shard_map(
        lambda u, p: first_step(clip, u, p)[1],
        mesh=mesh,
        in_specs=(specs, specs),
        out_specs=P(),
    )
    state = jax.jit(mapped)(updates, params)
    expected = first_step(oc.adaptive_grad_clip(0.1), updates, params)[1]
    assert np.isnan(expected.norms).tolist() == [False, True, False]
    for ours, right in zip(state[1:4], expected[1:4], strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-6)


def unsharded_state(clip):
    return first_step(clip, *case())[1]


def test_over_axes_reaches_every_clip_of_an_optimizer():
    """Also where some of them see only a part of the leaves."""
    specs = LAYOUTS["mixed"]

    def make():
        kernels = optax.masked(
            oc.adaptive_grad_clip(0.1),
            lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree),
        )
        return optax.chain(kernels, oc.clip_by_global_norm(1.0), optax.sgd(0.1))

    updates, params = case()
    expected, _ = first_step(make(), updates, params)
    mapped = jax.shard_map(
        lambda u, p: first_step(oc.over_axes(make(), specs), u, p)[0],
        mesh=grid(),
        in_specs=(specs, specs),
        out_specs=specs,
        check_vma=False,
    )
    helpers.assert_close(jax.jit(mapped)(updates, params), expected)


def test_over_axes_changes_nothing_outside_of_shard_map():
    updates, params = case()
    clip = oc.over_axes(oc.adaptive_grad_clip(0.1), LAYOUTS["mixed"])
    expected = first_step(oc.adaptive_grad_clip(0.1), updates, params)
    assert helpers.bits(first_step(clip, updates, params)) == helpers.bits(expected)


def test_over_axes_takes_a_norm_to_look_at():
    updates, _ = case()
    specs = LAYOUTS["two_axes"]
    mapped = jax.shard_map(
        oc.over_axes(oc.global_norm, specs),
        mesh=grid(),
        in_specs=(specs,),
        out_specs=P(),
        check_vma=False,
    )
    norm = jax.jit(mapped)(updates)
    np.testing.assert_allclose(norm, oc.global_norm(updates), rtol=1e-6)


def test_the_spec_of_the_smallest_subtree_holds():
    updates = {"mlp/out": {"w": jnp.arange(8.0)}, "mlp": {"w": jnp.ones(8)}}  # as Haiku
    specs = {"mlp": P("data"), "mlp/out": P()}
    mapped = jax.shard_map(
        oc.over_axes(oc.global_norm, specs),
        mesh=grid(),
        in_specs=({"mlp": {"w": P("data")}, "mlp/out": {"w": P()}},),
        out_specs=P(),
        check_vma=False,
    )
    np.testing.assert_allclose(
        jax.jit(mapped)(updates), oc.global_norm(updates), rtol=1e-6
    )


def test_traces_are_not_shared_between_specs():
    norm = jax.jit(oc.global_norm)
    found = []
    for spec in P("data"), P():
        mapped = jax.shard_map(
            oc.over_axes(norm, {"w": spec}),
            mesh=grid(),
            in_specs=({"w": spec},),
            out_specs=P(),
            check_vma=False,
        )
        length = 8 if spec == P("data") else 2  # two elements on every device
        found.append(float(jax.jit(mapped)({"w": jnp.ones(length)})))
    np.testing.assert_allclose(found, [8**0.5, 2**0.5], rtol=1e-6)


# --------------------------------------------------------------------------------------
# pmap
# --------------------------------------------------------------------------------------


def test_pmap_of_whole_gradients():
    updates, _ = case()
    clip = oc.over_axes(oc.clip_by_leaf_norm(1.0), P())
    stacked = jax.tree.map(lambda x: jnp.stack([x * i for i in range(8)]), updates)

    def step(u):
        return clip.update(jax.lax.pmean(u, "batch"), clip.init(u))

    clipped, state = jax.pmap(step, axis_name="batch")(stacked)
    mean = jax.tree.map(lambda x: x * 3.5, updates)
    expected, expected_state = first_step(oc.clip_by_leaf_norm(1.0), mean, mean)
    helpers.assert_close(jax.tree.map(lambda x: x[5], clipped), expected)
    np.testing.assert_allclose(state.norms[5], expected_state.norms, rtol=1e-6)


def test_pmap_of_pieces():
    vector = jnp.arange(16.0)
    clip = oc.over_axes(oc.clip_by_global_norm(1.0), P("i"))
    clipped = jax.pmap(lambda u: clip.update(u, None)[0], axis_name="i")(
        vector.reshape(8, 2)
    )
    expected = vector / np.linalg.norm(np.arange(16.0))
    np.testing.assert_allclose(clipped.ravel(), expected, rtol=1e-6)


# --------------------------------------------------------------------------------------
# Collectives
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["global_norm", "leaf_norm", "layer_norm", "agc"])
@pytest.mark.parametrize("leaves", [4, 12])
def test_the_number_of_collectives_is_that_of_axis_sets(name, leaves):
    """Not of leaves; on CPU the rare rescue has the same ones twice more."""
    shapes = {f"layer_{i}": {"kernel": (8, 4)} for i in range(leaves)}
    specs = dict.fromkeys(shapes, P("data", "model"))
    updates = helpers.random_tree(shapes=shapes)
    clip = oc.clip_by_group_norm(1.0) if name == "layer_norm" else table.clips[name]()
    mapped = jax.shard_map(
        lambda u: oc.over_axes(clip, specs).update(u, None, u)[0],
        mesh=grid(),
        in_specs=(specs,),
        out_specs=specs,
    )
    text = jax.jit(mapped).lower(updates).as_text()
    # Units differ over the axis of the kept dimension, so that all devices first agree
    # on which rescue to take; and params are measured as well.
    most = {"agc": 2 * (3 + 3)}.get(name, 3)
    assert "all_gather" not in text
    assert 1 <= text.count("all_reduce") <= most


@pytest.mark.parametrize("name", ["leaf_norm", "layer_norm", "block_rms", "agc"])
def test_under_jit_nothing_is_gathered(name):
    updates, params = case()
    specs, mesh = LAYOUTS["mixed"], grid()
    shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=is_spec)
    clip = table.clips[name]()
    step = jax.jit(
        lambda u, p: clip.update(u, None, p)[0],
        in_shardings=(shardings, shardings),
        out_shardings=shardings,
    )
    text = step.lower(updates, params).compile().as_text() or ""
    assert "all-gather" not in text
