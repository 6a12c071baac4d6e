"""What `over_axes` does under `jit`, where a mesh with automatic axes is set."""

import functools

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import helpers
import table
from helpers import oc
from layouts import LAYOUTS, SCALES, case, grid
from optaxclip._mesh import collectives

UNITS = oc.adaptive_grad_clip(0.1)
GLOBAL = oc.clip_by_global_norm(1.0)
VALUE = oc.clip_by_value((-0.5, 1.0))


def first_step(clip, updates, params):
    return clip.update(updates, clip.init(params), params)


def spread_as(specs, tree, mesh):
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    return jax.device_put(tree, shardings)


def told(clip, specs):
    """The first step of a clip that was told the specs, compiled."""
    return jax.jit(functools.partial(first_step, oc.over_axes(clip, specs)))


def assert_alike(found, expected):
    helpers.assert_close(found[0], expected[0])
    chex.assert_trees_all_close(found[1], expected[1], rtol=1e-6)


def on_gpu(function, *args):
    """The text of a step as lowered for a GPU, where it has no branches."""
    step = jax.jit(lambda *args: function(*args)).trace(*args)
    return step.lower(lowering_platforms=("cuda",)).as_text()


def sums(text):
    return text.count("stablehlo.all_reduce")


# --------------------------------------------------------------------------------------
# The same result, in fewer rounds
# --------------------------------------------------------------------------------------


NAMES = ["global_norm", "layer_norm", "block_rms", "agc", "agc_excluding", "adagc"]
NAMES += ["value"]


@functools.cache
def on_one_device(name):
    return jax.jit(lambda t, *args: first_step(table.clips[name](t), *args))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *helpers.in_turn(NAMES, list(LAYOUTS)),
        *helpers.in_turn(["agc", "value"], ["two_axes", "mixed"]),
        *helpers.in_turn(["value"], list(LAYOUTS)),
    ],
)
def test_a_clip_that_was_told_gives_what_one_device_gives(name, layout):
    specs, mesh = LAYOUTS[layout], grid()
    make = table.clips[name]
    step = jax.jit(lambda t, *args: first_step(oc.over_axes(make(t), specs), *args))
    for scale in map(jnp.float32, SCALES):
        updates, params = case(float(scale))
        expected = on_one_device(name)(scale, updates, params)
        with jax.set_mesh(mesh):
            every = (spread_as(specs, x, mesh) for x in (updates, params))
            assert_alike(step(scale, *every), expected)


@pytest.mark.parametrize(
    "scope", [GLOBAL, UNITS, VALUE], ids=["global", "units", "value"]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_specs_that_are_not_the_real_ones_cost_time_alone(scope, layout):
    mesh = grid()
    with jax.set_mesh(mesh):
        every = (spread_as(LAYOUTS["one_axis"], x, mesh) for x in case())
        found = told(scope, LAYOUTS[layout])(*every)
    assert_alike(found, first_step(scope, *case()))


@pytest.mark.parametrize(("clip", "count"), [(GLOBAL, 1), (UNITS, 5), (VALUE, 1)])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_it_takes_as_few_sums_as_inside_of_shard_map(kind, clip, count):
    """Of units two for the updates and two for the params, which the compiler joins."""
    specs, mesh = LAYOUTS["two_axes"], grid(kind)
    with jax.set_mesh(mesh):
        clip = oc.over_axes(clip, specs)
        every = [spread_as(specs, x, mesh) for x in case()]
        text = on_gpu(functools.partial(first_step, clip), *every)
    assert sums(text) == count


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_what_a_clip_by_value_counts_takes_one_sum_as_compiled(kind):
    specs, mesh = LAYOUTS["mixed"], grid(kind)
    with jax.set_mesh(mesh):
        every = [spread_as(specs, x, mesh) for x in case()]
        text = told(VALUE, specs).lower(*every).compile().as_text() or ""
    assert text.count(" all-reduce(") == 1
    assert "all-gather" not in text


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_clip_by_value_counts_what_one_device_has(layout, bad, kind):
    """Of numbers that are not finite, too, and to the bit."""
    (updates, params), mesh = case(), grid(kind)
    updates["dense"]["kernel"] = updates["dense"]["kernel"].at[5, 2].set(bad)
    expected = jax.jit(functools.partial(first_step, VALUE))(updates, params)
    with jax.set_mesh(mesh):
        every = (spread_as(LAYOUTS[layout], x, mesh) for x in (updates, params))
        found = told(VALUE, LAYOUTS[layout])(*every)
    chex.assert_trees_all_equal(found, expected)
    assert np.isnan(found[1].largest).tolist() == [False, np.isnan(bad), False]


def test_nothing_is_gathered():
    specs, mesh = LAYOUTS["two_axes"], grid()
    with jax.set_mesh(mesh):
        every = [spread_as(specs, x, mesh) for x in case()]
        text = told(UNITS, specs).lower(*every).compile().as_text() or ""
    assert "all-reduce" in text
    assert "all-gather" not in text


def test_outside_of_jit_too():
    specs, mesh = LAYOUTS["mixed"], grid()
    with jax.set_mesh(mesh):
        every = [spread_as(specs, x, mesh) for x in case()]
        found = first_step(oc.over_axes(UNITS, specs), *every)
        norm = oc.over_axes(oc.global_norm, specs)(every[0])
    assert_alike(found, first_step(UNITS, *case()))
    np.testing.assert_allclose(norm, oc.global_norm(case()[0]), rtol=1e-6)


def test_every_clip_of_an_optimizer_is_told():
    specs, mesh = LAYOUTS["two_axes"], grid()
    kernels = optax.masked(UNITS, lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree))
    optimizer = optax.chain(oc.skip_if_nonfinite(kernels), GLOBAL, optax.sgd(0.1))
    expected, _ = first_step(optimizer, *case())
    with jax.set_mesh(mesh):
        every = (spread_as(specs, x, mesh) for x in case())
        found, _ = told(optimizer, specs)(*every)
    helpers.assert_close(found, expected)


def test_the_state_shows_the_nan_of_any_device():
    updates, params = case()
    updates["dense"]["kernel"] = updates["dense"]["kernel"].at[-1, -1].set(jnp.nan)
    with jax.set_mesh(grid()):
        clipped, state = told(UNITS, LAYOUTS["two_axes"])(updates, params)
    assert np.isnan(state.norms).tolist() == [False, True, False]
    assert np.isnan(clipped["dense"]["kernel"]).sum(axis=0).tolist() == [0, 0, 0, 8]


# --------------------------------------------------------------------------------------
# Where it changes nothing
# --------------------------------------------------------------------------------------


def both_texts(specs, *args):
    """The texts of a step that was told and of one that was not."""
    return [
        on_gpu(functools.partial(first_step, clip), *args)
        for clip in (oc.over_axes(UNITS, specs), UNITS)
    ]


def test_without_a_mesh_it_changes_nothing():
    told_so, plain = both_texts(LAYOUTS["mixed"], *case())
    assert told_so == plain
    specs, mesh = LAYOUTS["mixed"], grid()
    told_so, plain = both_texts(specs, *(spread_as(specs, x, mesh) for x in case()))
    assert told_so == plain


@pytest.mark.parametrize(
    "kinds",
    [(AxisType.Auto, AxisType.Explicit), (AxisType.Explicit, AxisType.Auto)],
    ids=["auto_explicit", "explicit_auto"],
)
def test_axes_of_two_kinds_change_nothing(kinds):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=kinds)
    specs = LAYOUTS["mixed"]
    with jax.set_mesh(mesh):
        every = [spread_as(specs, x, mesh) for x in case()]
        told_so, plain = both_texts(specs, *every)
        found = told(UNITS, specs)(*every)
    assert told_so == plain
    assert_alike(found, first_step(UNITS, *case()))


def test_leaves_that_devices_cannot_share_evenly_are_measured_as_before():
    tree = {"odd": jnp.arange(18.0).reshape(6, 3), "even": jnp.ones((8, 4))}
    with jax.set_mesh(grid()):
        told_so, plain = both_texts({"odd": P("data"), "even": P("data")}, tree, tree)
        even, _ = both_texts({"odd": P("model"), "even": P("data")}, tree, tree)
        found = told(UNITS, P("data"))(tree, tree)
    assert told_so == plain != even
    assert_alike(found, first_step(UNITS, tree, tree))


def test_one_spec_for_whole_leaves_gathers_none():
    """It may have been given for a `pmap` that is elsewhere."""
    with jax.set_mesh(grid()):
        told_so, plain = both_texts(P(), *case())
    assert told_so == plain


def test_inside_of_a_shard_map_over_some_axes_the_compiler_sees_to_the_others():
    own = {"dense": {"bias": P(), "kernel": P("data")}, "head": {"kernel": P()}}
    clip, mesh = oc.over_axes(UNITS, LAYOUTS["mixed"]), grid()
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(
            lambda u, p: first_step(clip, u, p)[0],
            in_specs=(own, own),
            out_specs=own,
            axis_names={"data"},
        )
        every = [spread_as(LAYOUTS["mixed"], x, mesh) for x in case()]
        found = jax.jit(mapped)(*every)
    helpers.assert_close(found, first_step(UNITS, *case())[0])


def test_in_a_mesh_leaves_are_not_local_though_one_device_compiles(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert collectives.is_local(jnp.ones(3))
    with jax.set_mesh(grid()):
        assert not collectives.is_local(jnp.ones(3))


@pytest.mark.parametrize("spec", [P("expert"), P("data", None, None)], ids=str)
def test_a_spec_that_does_not_fit_raises(spec):
    message = r"Expected a spec for the shape .* on the mesh axes \['data', 'model'\]"
    clip = oc.over_axes(GLOBAL, spec)
    with jax.set_mesh(grid()), pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda u: clip.update(u, None), case()[0])


# --------------------------------------------------------------------------------------
# Inside of what JAX has for functions
# --------------------------------------------------------------------------------------


SPECS = LAYOUTS["two_axes"]


def weighed(clip, params, updates):
    """A number that depends on every element of what comes of a clip."""
    clipped, _ = clip.update(updates, None, params)
    leaves = jax.tree.leaves(clipped)
    return sum(jnp.sum(jnp.sin(jnp.arange(x.size) + x.ravel())) for x in leaves)


@pytest.mark.parametrize("clip", [GLOBAL, UNITS], ids=["global", "units"])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["", "remat"])
def test_derivatives(clip, wrap):
    def derivative(clip, updates, params):
        return jax.grad(wrap(functools.partial(weighed, clip, params)))(updates)

    expected = derivative(clip, *case())
    step = jax.jit(functools.partial(derivative, oc.over_axes(clip, SPECS)))
    with jax.set_mesh(grid()):
        found = step(*(spread_as(SPECS, x, grid()) for x in case()))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_derivative_of_a_compiled_step():
    inner = jax.jit(lambda u, p: weighed(oc.over_axes(UNITS, SPECS), p, u))
    with jax.set_mesh(grid()):
        every = [spread_as(SPECS, x, grid()) for x in case()]
        found = jax.grad(lambda u: inner(u, every[1]))(every[0])
    expected = jax.grad(functools.partial(weighed, UNITS, case()[1]))(case()[0])
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("clip", [GLOBAL, UNITS], ids=["global", "units"])
@pytest.mark.parametrize("largest", [1.0, 1e30])
def test_a_batch(clip, largest):
    """Of which one example may be so large that it has to be measured anew."""
    sizes = jnp.array([1.0, 0.0, largest])
    updates = jax.tree.map(lambda x: jnp.stack([x * s for s in sizes]), case()[0])
    step = jax.vmap(lambda c, u: first_step(c, u, case()[1]), (None, 0))
    expected = step(clip, updates)
    with jax.set_mesh(grid()):
        found = jax.jit(functools.partial(step, oc.over_axes(clip, SPECS)))(updates)
    assert_alike(found, expected)


def test_many_steps_in_a_scan():
    def steps(clip, updates, params):
        def body(carry, scale):
            params, state = carry
            scaled = jax.tree.map(lambda x: x * scale, updates)
            clipped, state = clip.update(scaled, state, params)
            return (optax.apply_updates(params, clipped), state), None

        carry = params, clip.init(params)
        return jax.lax.scan(body, carry, jnp.array([1.0, 1e30, 0.01]))[0]

    expected = steps(UNITS, *case())
    with jax.set_mesh(grid()):
        every = (spread_as(SPECS, x, grid()) for x in case())
        found = jax.jit(functools.partial(steps, oc.over_axes(UNITS, SPECS)))(*every)
    chex.assert_trees_all_close(found, expected, rtol=1e-5)


# --------------------------------------------------------------------------------------
# Kept for later
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("platforms", [("cpu",), ("cpu", "cuda", "tpu")], ids=len)
def test_it_can_be_exported(platforms):
    def step(updates, params):
        return oc.over_axes(UNITS, SPECS).update(updates, None, params)[0]

    with jax.set_mesh(grid()):
        every = [spread_as(SPECS, x, grid()) for x in case()]
        exported = jax.export.export(jax.jit(step), platforms=platforms)(*every)
        found = jax.jit(exported.call)(*every)
    assert exported.nr_devices == 8
    helpers.assert_close(found, first_step(UNITS, *case())[0])


def test_it_is_found_in_the_compilation_cache(tmp_path):
    names = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_enable_compilation_cache": True,
    }
    before = {name: getattr(jax.config, name) for name in names}
    try:
        for name, value in names.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        counts, found = [], []
        for _ in range(2):
            jax.clear_caches()
            with jax.set_mesh(grid()):
                every = [spread_as(SPECS, x, grid()) for x in case()]
                found.append(told(UNITS, SPECS)(*every))
            counts.append(len(list(tmp_path.iterdir())))
    finally:
        compilation_cache.reset_cache()
        for name, value in before.items():
            jax.config.update(name, value)
    assert counts[0] == counts[1] > 0
    assert helpers.bits(found[0]) == helpers.bits(found[1])
