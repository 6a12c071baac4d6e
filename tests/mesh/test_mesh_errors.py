"""Tied leaves count once, and what cannot be known of a mesh raises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import helpers
import in_numpy
import table
from helpers import oc
from layouts import LAYOUTS, SCALES, case, grid
from optaxclip import norms

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
    np.testing.assert_allclose(norm, in_numpy.vector_norm(counted), rtol=1e-6)


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
    clip = table.clips[name]()

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


def test_pmap_over_an_axis_with_a_name_asks_for_specs():
    clip = oc.clip_by_global_norm(1.0)
    step = jax.pmap(lambda u: clip.update(u, None)[0], axis_name="batch")
    remedy = (
        r"`pmap` over \['batch'\].*`optaxclip.over_axes\(clip, PartitionSpec\(\)\)`"
    )
    with pytest.raises(ValueError, match=remedy):
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
    clip = oc.over_axes(oc.clip_by(table.twice_the_leaf_norm, 1.0), LAYOUTS["mixed"])
    with pytest.raises(ValueError, match=r"norm of `optaxclip.norms`.*check_vma=True"):
        inside(lambda u, p: clip.update(u, None)[0], check_vma=False)


def test_leaves_that_do_not_count_have_to_exist():
    with pytest.raises(ValueError, match=r"`exclude`.*'tail' matches none"):
        norms.excluding(oc.global_norm, "tail")(case()[0])
    with pytest.raises(TypeError, match="`exclude` to be a path pattern or several"):
        oc.norms.excluding(oc.global_norm, 3)
    with pytest.raises(TypeError, match=r"`excluding\(norm, exclude\)`, got norm=2"):
        oc.norms.excluding(2, "head")
