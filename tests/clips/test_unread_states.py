"""A state that is no clip's is passed along unread, as Optax's clips pass theirs."""

import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import helpers
from helpers import oc
from optaxclip import thresholds

UPDATES, PARAMS = helpers.updates_and_params()

CLIPS = {
    "clip": lambda m: m.clip(0.1),
    "clip_by_global_norm": lambda m: m.clip_by_global_norm(1.0),
    "clip_by_block_rms": lambda m: m.clip_by_block_rms(1.0),
    "adaptive_grad_clip": lambda m: m.adaptive_grad_clip(0.1),
    "normalize_by_update_norm": lambda m: m.normalize_by_update_norm(),
}


def train_state():
    create = flax.training.train_state.TrainState.create
    return create(apply_fn=print, params=PARAMS, tx=optax.adam(1e-3))


STATES = {
    "None": lambda: None,
    "EmptyState": optax.EmptyState,
    "nothing": tuple,
    "TrainState": train_state,
    "of the whole chain": lambda: optax.chain(oc.clip(1.0), optax.adam(0.1)).init(
        PARAMS
    ),
    "of Adam": lambda: optax.scale_by_adam().init(PARAMS),
    "params": lambda: PARAMS,
}
MEMORIES = {
    "schedule": lambda: oc.clip_by_global_norm(lambda count: 1.0),
    "schedule of a range": lambda: oc.clip_by_value(lambda count: 1.0),
    "rule": lambda: oc.clip_by_global_norm(thresholds.mean_plus_std(3.0, decay=0.9)),
}

every_clip = pytest.mark.parametrize("make", CLIPS.values(), ids=CLIPS)
every_state = pytest.mark.parametrize("state", STATES.values(), ids=STATES)
every_memory = pytest.mark.parametrize("make", MEMORIES.values(), ids=MEMORIES)


@every_clip
@every_state
def test_a_clip_does_what_optax_does_and_returns_the_state_untouched(make, state):
    given = state()
    expected, _ = make(optax).update(UPDATES, given, PARAMS)
    got, same = make(oc).update(UPDATES, given, PARAMS)
    helpers.assert_close(got, expected, rtol=1e-6)
    assert jax.tree.structure(same) == jax.tree.structure(given)
    pairs = zip(jax.tree.leaves(same), jax.tree.leaves(given), strict=True)
    assert all(x is y for x, y in pairs)


@every_clip
def test_under_jit_too(make):
    """As MaxText does: the clip is inside of the step, and gets all of its state."""

    @jax.jit
    def step(state, grads):
        grads, _ = make(oc).update(grads, state, state.params)
        return state.apply_gradients(grads=grads)

    expected, _ = make(oc).update(UPDATES, None, PARAMS)
    state = step(train_state(), UPDATES)
    mean = optax.tree.get(state.opt_state, "mu")
    helpers.assert_close(mean, jax.tree.map(lambda x: 0.1 * x, expected), rtol=1e-5)


@every_memory
@every_state
def test_a_threshold_with_a_memory_says_what_it_got(make, state):
    given = state()
    name = "none" if given is None else f"a {type(given).__name__}"
    message = f"Expected the state of this clip.*got {name}. Call `state = clip.init"
    with pytest.raises(ValueError, match=message):
        make().update(UPDATES, given, PARAMS)


@every_clip
def test_the_state_of_another_clip_raises(make):
    other = oc.zero_nonfinite().init(PARAMS)
    with pytest.raises(
        TypeError, match="got ZeroNonfiniteState: it belongs to another"
    ):
        make(oc).update(UPDATES, other, PARAMS)


@every_clip
def test_a_state_in_the_place_of_the_params_raises(make):
    clip = make(oc)
    with pytest.raises(TypeError, match=r"`clip.update\(updates, state, params\)` in"):
        clip.update(UPDATES, PARAMS, clip.init(PARAMS))


def test_a_state_of_its_own_is_read():
    clip = oc.clip_by_global_norm(1.0)
    _, state = clip.update(UPDATES, clip.init(PARAMS))
    assert state.update_count == 1
    np.testing.assert_allclose(state.norms, jnp.asarray(oc.global_norm(UPDATES)))
