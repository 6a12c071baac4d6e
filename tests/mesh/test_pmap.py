"""In `pmap` every device holds whole gradients: what a clip does there, and Optax's.

Without an `axis_name` no collective can cross the axis, which is known. With one it
can't be told from `shard_map(check_vma=False)`, where leaves may be pieces.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec as P

import helpers
from helpers import oc
from optaxclip._mesh import collectives

UPDATES, PARAMS = helpers.updates_and_params()

# Each device has its own gradient, i + 1 times the first one's.
STACKED = jax.tree.map(lambda x: jnp.stack([x * (i + 1) for i in range(8)]), UPDATES)

CLIPS = {
    "value": lambda m: m.clip(0.1),
    "global norm": lambda m: m.clip_by_global_norm(1.0),
    "block rms": lambda m: m.clip_by_block_rms(1.0),
    "agc": lambda m: m.adaptive_grad_clip(0.1),
    "update norm": lambda m: m.normalize_by_update_norm(),
}
every_clip = pytest.mark.parametrize("make", CLIPS.values(), ids=CLIPS)


def first_step(clip, grads):
    return clip.update(grads, clip.init(PARAMS), PARAMS)


@every_clip
def test_without_an_axis_name_each_device_clips_its_own_as_optax_does(make):
    clip = make(oc)
    got, _ = jax.pmap(lambda u: first_step(clip, u))(STACKED)
    expected, _ = jax.pmap(lambda u: first_step(make(optax), u))(STACKED)
    helpers.assert_close(got, expected, rtol=2e-6)


@every_clip
def test_over_a_named_axis_one_word_makes_it_optax_answer(make):
    clip = oc.over_axes(make(oc), P())

    def step(clip, u):
        return first_step(clip, jax.lax.pmean(u, "batch"))

    got, _ = jax.pmap(lambda u: step(clip, u), axis_name="batch")(STACKED)
    expected, _ = jax.pmap(lambda u: step(make(optax), u), axis_name="batch")(STACKED)
    helpers.assert_close(got, expected, rtol=2e-6)


def test_without_an_axis_name_what_a_clip_saw_is_of_each_device():
    clip = oc.clip_by_leaf_norm(1.0)
    _, states = jax.pmap(lambda u: first_step(clip, u))(STACKED)
    _, expected = first_step(clip, UPDATES)
    for i in range(8):
        np.testing.assert_allclose(states.norms[i], expected.norms * (i + 1), rtol=1e-6)


def test_without_an_axis_name_each_guard_decides_for_its_device():
    tx = oc.skip_if_nonfinite(optax.chain(oc.clip_by_global_norm(1.0), optax.sgd(1.0)))
    broken = {"w": jnp.ones((8, 2)).at[3, 0].set(jnp.nan)}
    updates, states = jax.pmap(lambda u: tx.update(u, tx.init(u), u))(broken)
    assert list(states.skipped_count) == [0, 0, 0, 1, 0, 0, 0, 0]
    assert not np.any(updates["w"][3]) and np.all(updates["w"][4] < 0)


def test_the_axis_that_pmap_makes_up_is_known_from_all_others():
    seen = {}

    def look(name):
        def fun(x):
            seen[name] = [str(axis) for axis in collectives.manual_axes()]
            return x

        return fun

    mesh = Mesh(jax.devices(), ("i",))
    x = jnp.ones((8, 2))
    jax.pmap(look("pmap"))(x)
    jax.pmap(look("named"), axis_name="i")(x)
    for check in True, False:
        spread = jax.shard_map(
            look(check), mesh=mesh, in_specs=P("i"), out_specs=P("i"), check_vma=check
        )
        jax.jit(spread)(x)
    assert seen == {"pmap": [], "named": ["i"], True: ["i"], False: ["i"]}
