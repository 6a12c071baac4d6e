"""A NaN on any device is seen, where the largest of all devices' numbers is taken.

A collective that takes the largest may return a number though there is a NaN: so it
does on a CPU.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from helpers import oc
from optaxclip import norms

SPECS = {"kernel": P("x", "y"), "bias": P("y")}
UPDATES = {
    "kernel": jnp.arange(1.0, 33.0).reshape(8, 4) / 10,
    "bias": jnp.array([0.1, -0.2, 0.3, -0.4]),
}

CLIPS = {
    "inf norm": lambda: oc.clip_by(
        functools.partial(norms.leaf_norms, ord=np.inf), 1.0
    ),
    "inf norm of units": lambda: oc.clip_by(
        functools.partial(norms.unit_norms, ord=np.inf), 1.0
    ),
    "value": lambda: oc.clip_by_value(0.5),
    "layers": lambda: oc.over_layers(oc.adaptive_grad_clip(0.1), {"bias": 0}),
}


def first_step(clip, updates, params):
    return clip.update(updates, clip.init(params), params)


def grid(kind):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))


def on(mesh, tree):
    return jax.device_put(
        tree, {key: NamedSharding(mesh, spec) for key, spec in SPECS.items()}
    )


def spread(clip, setting):
    mesh = grid(AxisType.Explicit if setting == "explicit" else AxisType.Auto)
    step = functools.partial(first_step, oc.over_axes(clip, SPECS))
    if setting == "shard_map":
        whole = functools.partial(first_step, clip)
        _, state = jax.eval_shape(whole, UPDATES, UPDATES)
        step = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(SPECS, SPECS),
            out_specs=(SPECS, jax.tree.map(lambda _: P(), state)),
        )

    def run(updates):
        with jax.set_mesh(mesh):
            return jax.jit(step)(on(mesh, updates), on(mesh, UPDATES))

    return run


@pytest.mark.parametrize("setting", ["auto", "explicit", "shard_map"])
@pytest.mark.parametrize("name", CLIPS)
def test_a_nan_on_any_device_is_seen(name, setting):
    clip = CLIPS[name]()
    run = spread(clip, setting)
    for place in (0, 0), (2, 1), (5, 2), (7, 3):
        kernel = UPDATES["kernel"].at[place].set(jnp.nan)
        updates = UPDATES | {"kernel": kernel}
        expected = jax.jit(functools.partial(first_step, clip))(updates, UPDATES)
        assert any(np.isnan(x).any() for x in jax.tree.leaves(expected[1]))
        chex.assert_trees_all_close(run(updates), expected, rtol=1e-6)


def test_the_state_of_units_over_explicit_axes_has_a_derivative():
    """Of what it says of the unit clipped hardest, which is looked for by a minimum."""
    clip = oc.adaptive_grad_clip(0.1)

    def norms_seen(updates, params):
        return jnp.sum(first_step(clip, updates, params)[1].norms)

    mesh, slope = grid(AxisType.Explicit), jax.grad(norms_seen)
    with jax.set_mesh(mesh):
        found = jax.jit(slope)(on(mesh, UPDATES), on(mesh, UPDATES))
    chex.assert_trees_all_close(found, slope(UPDATES, UPDATES), rtol=1e-6)
