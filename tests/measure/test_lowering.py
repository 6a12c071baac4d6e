"""Which form a norm has follows from where the step is lowered for, and how it is laid.

The forms themselves are in `test_platforms.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import helpers
from helpers import oc


def lowered(platforms):
    clip = oc.clip_by_global_norm(1.0)
    step = jax.jit(lambda updates: clip.update(updates, None)[0])
    traced = step.trace({"w": jnp.ones((7, 3)), "b": jnp.ones(3, jnp.bfloat16)})
    return traced.lower(lowering_platforms=platforms).as_text()


@pytest.mark.parametrize(
    ("platform", "is_in_doubles"), [("cpu", False), ("cuda", True), ("tpu", False)]
)
def test_a_step_has_the_form_of_the_platform_that_it_is_lowered_for(
    platform, is_in_doubles
):
    assert ("f64" in lowered((platform,))) == is_in_doubles


def test_a_step_for_several_platforms_has_the_forms_of_all():
    assert "f64" in lowered(("cpu", "cuda"))


@pytest.mark.parametrize(
    "norm", [oc.global_norm, oc.norms.leaf_norms, oc.norms.group_norms()]
)
def test_norms_over_explicit_axes_take_one_sum_over_devices(norm):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    specs = [P("a", "b"), P("b"), P("a"), P(None, "a"), P()]
    shapes = [(8, 4), (6,), (4,), (3, 8), (5,)]
    draw = np.random.default_rng(0)
    whole = [np.float32(draw.normal(size=shape)) for shape in shapes]
    pairs = zip(whole, specs, strict=True)
    leaves = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in pairs]
    with jax.set_mesh(mesh):
        program = jax.make_jaxpr(norm)(leaves).jaxpr
        found = jax.jit(norm)(leaves)
    choice, *_ = (
        x for x in helpers.steps(program) if x.params.get("branches_platforms")
    )
    on_gpu = choice.params["branches"][1].jaxpr
    assert sum(x.primitive.name.startswith("psum") for x in helpers.steps(on_gpu)) == 1
    found, right = jax.tree.leaves(found), jax.tree.leaves(norm(whole))
    np.testing.assert_allclose(found, right, rtol=1e-6)


@pytest.mark.parametrize("leaves", [2, 6])
def test_units_over_explicit_axes_take_as_few_sums_however_many_leaves(leaves):
    """One for all units and one for those that are whole leaves, of the updates and of
    the params, which the compiler joins; one to agree on the unit clipped hardest.
    """
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    clip = oc.adaptive_grad_clip(0.1)
    specs = {"bias": P("b"), "kernel": P("a", "b")}
    layer = {
        key: jax.ShapeDtypeStruct((8, 4)[-len(spec) :], "float32").update(
            sharding=NamedSharding(mesh, spec)
        )
        for key, spec in specs.items()
    }
    updates = [layer] * leaves
    with jax.set_mesh(mesh):
        state = clip.init(updates)
        traced = jax.jit(clip.update).trace(updates, state, updates)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.all_reduce") == 2 * 2 + 1
