"""One meaning on every mesh: what a clip owes where leaves are spread over devices.

The first part holds every clip of the table to it, on eight virtual devices: under
`jit` with sharded arrays, inside `shard_map` that keeps types, and inside one that does
not, where specs say how the leaves are split.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import helpers
from helpers import every_clip, norms, oc

SHAPES = {"dense": {"bias": (8,), "kernel": (8, 4)}, "head": {"kernel": (4, 8)}}

LAYOUTS = {
    "mixed": {
        "dense": {"bias": P(), "kernel": P("data", "model")},
        "head": {"kernel": P(None, "model")},
    },
    "replicated": {"dense": {"bias": P(), "kernel": P()}, "head": {"kernel": P()}},
    "one_axis": {
        "dense": {"bias": P("data"), "kernel": P("data", None)},
        "head": {"kernel": P(None, "data")},
    },
    "two_axes": {
        "dense": {"bias": P(("data", "model")), "kernel": P("data", "model")},
        "head": {"kernel": P("data", "model")},
    },
    "one_dimension_over_two_axes": {
        "dense": {"bias": P("model"), "kernel": P(("model", "data"))},
        "head": {"kernel": P(None, ("data", "model"))},
    },
}
SCALES = (1.0, 1e25, 1e-25)
UNITS = ("unit_norm", "agc", "agc_excluding")  # their splits types can't tell
MATRICES = ("singular_values", "spectral_norm")  # of whole leaves: see test_matrices
SETTINGS = ("auto", "explicit", "shard_map", "shard_map_without_types")


def is_spec(x):
    return isinstance(x, P)


def grid(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)


def case(scale=1.0):
    updates = helpers.random_tree(seed=1, scale=2 * scale, shapes=SHAPES)
    return updates, helpers.random_tree(seed=2, scale=scale, shapes=SHAPES)


def first_step(clip, updates, params):
    return clip.update(updates, clip.init(params), params)


@functools.cache
def unsharded(name):
    return jax.jit(lambda u, p, t: first_step(helpers.clips[name](t), u, p))


def state_specs(name, specs):
    """What is like the params in a state is split like them."""
    clip = helpers.clips[name]()
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
        clip = helpers.clips[name](t)
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


@pytest.mark.parametrize("setting", SETTINGS[:3])
@every_clip()
def test_a_sharded_update_is_clipped_as_on_one_device(name, setting):
    check(name, setting, "mixed")


@every_clip(BLIND)
def test_specs_stand_in_for_types(name):
    check(name, "shard_map_without_types", "mixed")


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("global_norm", "shard_map"),
        ("global_norm", "shard_map_without_types"),
        ("layer_norm", "shard_map"),
        ("block_rms", "shard_map_without_types"),
        ("agc", "shard_map"),
    ],
)
def test_every_layout(name, setting, layout):
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
    clip, mesh = oc.over_axes(helpers.clips[name](), LAYOUTS["mixed"]), grid()
    if name != "agc":
        clip = helpers.clips[name]()  # types tell
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
    helpers.assert_close(found, first_step(helpers.clips[name](), updates, params)[0])


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
    clip = oc.clip_by_group_norm(1.0) if name == "layer_norm" else helpers.clips[name]()
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
    clip = helpers.clips[name]()
    step = jax.jit(
        lambda u, p: clip.update(u, None, p)[0],
        in_shardings=(shardings, shardings),
        out_shardings=shardings,
    )
    text = step.lower(updates, params).compile().as_text() or ""
    assert "all-gather" not in text


# --------------------------------------------------------------------------------------
# Tied and frozen leaves
# --------------------------------------------------------------------------------------


def test_a_tied_leaf_counts_once_and_is_scaled_like_the_rest():
    updates, _ = case()
    updates = {**updates, "tied": updates["head"]["kernel"].T}
    clip = oc.clip_by(norms.excluding(oc.global_norm, "tied"), 1.0)
    clipped, _ = clip.update(updates, None)
    tied = clipped.pop("tied")
    expected, _ = oc.clip_by_global_norm(1.0).update(clipped | case()[0], None)
    helpers.assert_close(clipped, expected)
    helpers.assert_close(tied, expected["head"]["kernel"].T)


def test_leaves_that_do_not_count_may_be_named_by_several_patterns():
    updates, _ = case()
    norm = norms.excluding(norms.leaf_norms, ("*/bias", "dense/bias", "head"))
    found = norm(updates)
    assert (found["dense"]["bias"], found["head"]["kernel"]) == (0, 0)
    assert found["dense"]["kernel"] == norms.leaf_norms(updates)["dense"]["kernel"]


@pytest.mark.parametrize("scale", SCALES)
def test_what_does_not_count_is_left_out_at_every_magnitude(scale):
    updates, _ = case(scale)
    updates = {**updates, "tied": jnp.full(3, 3e38)}
    norm = norms.excluding(oc.global_norm, "tied")(updates)
    counted = helpers.truth(jax.tree.leaves(case(scale)[0]))
    np.testing.assert_allclose(norm, helpers.vector_norm(counted), rtol=1e-6)


# --------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------


def inside(function, specs=None, **options):
    """Traces a function of updates and params inside `shard_map`."""
    specs = specs or LAYOUTS["mixed"]
    mapped = jax.shard_map(
        function, mesh=grid(), in_specs=(specs, specs), out_specs=specs, **options
    )
    return jax.eval_shape(mapped, *case())


@pytest.mark.parametrize("name", ["global_norm", "value"])
def test_an_update_that_is_not_yet_summed_over_devices_raises(name):
    clip = helpers.clips[name]()

    def step(updates, params):
        share = jax.lax.axis_index("model") * updates["dense"]["bias"]
        updates = {**updates, "dense": {**updates["dense"], "bias": share}}
        return clip.update(updates, clip.init(params), params)[0]

    message = (
        r"summed over devices, got 'dense/bias' .* axes \['model'\].*`jax.lax.psum`"
    )
    with pytest.raises(ValueError, match=message):
        inside(step)


def test_an_unreduced_update_raises():
    mesh = grid(AxisType.Explicit)
    with jax.set_mesh(mesh):
        rows = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, P("data")))

        def step(x):
            out = P(None, None, unreduced=frozenset({"data"}))
            grads = {"w": jnp.einsum("ab,ac->bc", x, x, out_sharding=out)}
            return oc.clip_by_global_norm(1.0).update(grads, None)[0]

        with pytest.raises(
            ValueError, match=r"got 'w' still to be summed .*\['data'\]"
        ):
            jax.eval_shape(step, rows)


def test_without_types_a_clip_asks_for_specs():
    def step(updates, params):
        return oc.clip_by_leaf_norm(1.0).update(updates, None)[0]

    with pytest.raises(ValueError, match=r"over_axes\(clip, specs\)"):
        inside(step, check_vma=False)


def test_pmap_asks_for_specs():
    step = jax.pmap(lambda u: oc.clip_by_global_norm(1.0).update(u, None)[0])
    with pytest.raises(ValueError, match=r"`pmap`.*over_axes\(clip, specs\)"):
        step(jnp.ones((8, 3)))


def test_units_of_a_split_leaf_ask_for_specs():
    def step(updates, params):
        return oc.adaptive_grad_clip(0.1).update(updates, None, params)[0]

    with pytest.raises(ValueError, match=r"'dense/kernel' is split .*over_axes"):
        inside(step)


def test_a_leaf_without_a_spec_raises():
    clip = oc.over_axes(oc.clip_by_global_norm(1.0), {"dense": P()})
    with pytest.raises(
        ValueError, match=r"none for 'head/kernel', only for \['dense'\]"
    ):
        inside(lambda u, p: clip.update(u, None)[0], check_vma=False)


def test_the_spec_of_a_module_serves_no_other_whose_name_begins_alike():
    clip = oc.over_axes(oc.clip_by_global_norm(1.0), {"dense": P()})
    tree = {"dense": {"kernel": jnp.ones(2)}, "dense_1": {"kernel": jnp.ones(2)}}
    step = jax.shard_map(
        lambda u: clip.update(u, None)[0],
        mesh=grid(),
        in_specs=P(),
        out_specs=P(),
        check_vma=False,
    )
    with pytest.raises(ValueError, match=r"none for 'dense_1/kernel', only"):
        jax.eval_shape(step, tree)


@pytest.mark.parametrize("spec", [P("data", None, None), P("expert")], ids=str)
def test_a_spec_that_does_not_fit_raises(spec):
    clip = oc.over_axes(oc.clip_by_global_norm(1.0), spec)
    message = r"Expected a spec for the shape .* on the mesh axes \['data', 'model'\]"
    with pytest.raises(ValueError, match=message):
        inside(lambda u, p: clip.update(u, None)[0], check_vma=False)


def test_a_spec_that_constrains_nothing_raises():
    clip = oc.over_axes(oc.clip_by_global_norm(1.0), P(P.UNCONSTRAINED))
    with pytest.raises(ValueError, match="Expected a spec for the shape"):
        inside(lambda u, p: clip.update(u, None)[0], check_vma=False)


def test_a_leaf_that_differs_over_fewer_axes_than_its_spec_raises():
    clip = oc.over_axes(oc.clip_by_global_norm(1.0), P("data"))
    with pytest.raises(ValueError, match=r"'dense/bias' to be split as its spec says"):
        inside(lambda u, p: clip.update(u, None)[0], LAYOUTS["replicated"])


def test_a_leaf_that_differs_over_more_axes_than_its_spec_raises():
    clip = oc.over_axes(oc.clip_by_global_norm(1.0), P())
    with pytest.raises(
        ValueError, match=r"'dense/kernel' to be split as its spec says"
    ):
        inside(lambda u, p: clip.update(u, None)[0])


def test_over_axes_raises_for_what_is_not_a_spec_or_not_a_clip():
    with pytest.raises(
        TypeError, match=r"tree of jax.sharding.PartitionSpec, got 'data'"
    ):
        oc.over_axes(oc.clip(1.0), {"w": "data"})
    with pytest.raises(TypeError, match=r"specs\)`, got 3 of type int"):
        oc.over_axes(3, P())
    with pytest.raises(TypeError, match=r"such as `over_axes\(clip_by_global_norm"):
        oc.over_axes(oc.clip_by_global_norm, P())(1.0)


def test_a_norm_of_ones_own_that_forgets_other_devices_raises():
    clip = oc.clip_by(lambda u: jax.tree.map(jnp.linalg.norm, u), 1.0)
    with pytest.raises(ValueError, match=r"same on all devices.*`jax.lax.psum`"):
        inside(lambda u, p: clip.update(u, None)[0])


def test_a_norm_of_ones_own_needs_types_where_leaves_are_split():
    clip = oc.over_axes(oc.clip_by(helpers.twice_the_leaf_norm, 1.0), LAYOUTS["mixed"])
    with pytest.raises(ValueError, match=r"norm of `optaxclip.norms`.*check_vma=True"):
        inside(lambda u, p: clip.update(u, None)[0], check_vma=False)


def test_leaves_that_do_not_count_have_to_exist():
    with pytest.raises(ValueError, match=r"`exclude`.*'tail' matches none"):
        norms.excluding(oc.global_norm, "tail")(case()[0])
    with pytest.raises(TypeError, match="`exclude` to be a path pattern or several"):
        oc.norms.excluding(oc.global_norm, 3)
    with pytest.raises(TypeError, match=r"`excluding\(norm, exclude\)`, got norm=2"):
        oc.norms.excluding(2, "head")
