"""Optimizers with a clip in them, whose own can be Optax's or ours, and a few steps."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import helpers
from helpers import Tree, oc

ADAM = optax.adamw(optax.linear_schedule(0.1, 0.01, 10))
LABELS = {"dense": "body", "head": "head"}
MASK = {"dense": True, "head": False}


def clipped(m, max_norm=1.0):
    return optax.chain(m.clip_by_global_norm(max_norm), ADAM)


def partition(m):
    parts: Any = {
        "body": clipped(m),
        "head": optax.chain(m.clip(0.5), optax.sgd(0.1, 0.9)),
    }
    return optax.partition(parts, LABELS)


def injected(m):
    @optax.inject_hyperparams
    def made(learning_rate, max_norm):
        return optax.chain(m.clip_by_global_norm(max_norm), optax.adam(learning_rate))

    return made(learning_rate=optax.linear_schedule(0.1, 0.01, 10), max_norm=0.5)


# By what is said of them in docs/checkpoints.md; `m` has the clips: `optax` or ours.
OPTIMIZERS: dict[str, Any] = {
    "chain": clipped,
    "clip alone": lambda m: m.clip_by_global_norm(1.0),
    "clip at the end": lambda m: optax.chain(
        optax.scale_by_adam(), m.clip_by_block_rms(1.0), optax.scale(-0.1)
    ),
    "chain in a chain": lambda m: optax.chain(
        optax.chain(m.adaptive_grad_clip(0.1), m.clip(0.5)),
        optax.chain(optax.trace(0.9), optax.scale(-0.1)),
    ),
    "named_chain": lambda m: optax.named_chain(
        ("clip", m.clip_by_global_norm(1.0)), ("adam", ADAM)
    ),
    "MultiSteps": lambda m: optax.MultiSteps(clipped(m), 2).gradient_transformation(),
    "inject_hyperparams": injected,
    "inject_hyperparams of a clip": lambda m: optax.chain(
        optax.inject_hyperparams(m.clip_by_global_norm)(max_norm=0.5), ADAM
    ),
    "partition": partition,
    "masked": lambda m: optax.masked(clipped(m), MASK),
    "masked clip": lambda m: optax.chain(optax.masked(m.clip(0.5), MASK), ADAM),
    "apply_if_finite": lambda m: optax.apply_if_finite(clipped(m), 3),
    "schedule_free": lambda m: optax.chain(
        m.clip_by_global_norm(1.0),
        optax.contrib.schedule_free(optax.sgd(0.1), 0.1),
    ),
}


def trained(optimizer, count=3, state: Tree = None, params: Tree = None):
    """The params and the state after some steps, from others where they are given."""
    params = helpers.random_tree(seed=9) if params is None else params
    state = optimizer.init(params) if state is None else state
    update = jax.jit(optimizer.update)
    for i in range(count):
        grads = jax.tree.map(lambda p, i=i: jnp.sin(3 * p + i) + p, params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def guarded_and_recorded(optimizer) -> Any:
    return oc.record(oc.skip_if_nonfinite(optimizer), size=4)
