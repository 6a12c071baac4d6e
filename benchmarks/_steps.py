"""Which training steps do the benchmarks compare?

A clip, SGD with momentum (or Adam) and `optax.apply_updates`; without a clip, with
Optax's or ours; alone or within a guard.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import optaxclip
from optaxclip import norms

Tree = Any
Step = Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]
Guard = Callable[[optax.GradientTransformation], optax.GradientTransformation]

NO_CLIP, OPTAX, OURS = "no clip", "optax", "optaxclip"
CLIP_ALONE, OPTAX_GUARD = "clip alone", "apply_if_finite"
PASSES = 5  # over memory, without a clip


class Clip(NamedTuple):
    """Our clip, Optax's own of that name if it has one, and the passes over memory."""

    ours: optax.GradientTransformation
    optax: optax.GradientTransformation | None
    passes: int


# The thresholds are low enough that every one of these clips has something to do.
CLIPS = {
    "global_norm": Clip(
        optaxclip.clip_by_global_norm(0.1), optax.clip_by_global_norm(0.1), PASSES + 1
    ),
    "value": Clip(optaxclip.clip(0.01), optax.clip(0.01), PASSES),
    "leaf_norm": Clip(optaxclip.clip_by_leaf_norm(0.1), None, PASSES + 1),
    "group_norm": Clip(optaxclip.clip_by_group_norm(0.1), None, PASSES + 1),
    "block_rms": Clip(
        optaxclip.clip_by_block_rms(0.01), optax.clip_by_block_rms(0.01), PASSES + 1
    ),
    "adaptive": Clip(  # reads the params, too
        optaxclip.adaptive_grad_clip(0.01), optax.adaptive_grad_clip(0.01), PASSES + 2
    ),
}
GUARDS: dict[str, Guard] = {
    CLIP_ALONE: lambda inner: inner,
    "skip_if_nonfinite": optaxclip.skip_if_nonfinite,
    "skip_if_spike": optaxclip.skip_if_spike,
    OPTAX_GUARD: lambda inner: optax.apply_if_finite(inner, 10),
}
RECORD = "record"
RECORDS: dict[str, Guard] = {
    CLIP_ALONE: lambda inner: inner,
    RECORD: optaxclip.record,
    "record, global norm": lambda inner: optaxclip.record(inner, norms.global_norm),
}
# With the state that is, after a first step, what came out of the clip.
OPTIMIZERS = {
    "momentum": (optax.sgd(0.01, momentum=0.9), "trace"),
    "adam": (optax.adam(0.01), "mu"),
}


def with_momentum(clip: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(clip, OPTIMIZERS["momentum"][0])


def guarded(optimizer: str) -> dict[str, optax.GradientTransformation]:
    """Returns the optimizer with a clip, alone and within each guard."""
    inner = optax.chain(optaxclip.clip_by_global_norm(0.1), OPTIMIZERS[optimizer][0])
    return {name: guard(inner) for name, guard in GUARDS.items()}


def recorded(clip: str) -> dict[str, optax.GradientTransformation]:
    """Returns the optimizer with a clip, alone and within each record."""
    inner = with_momentum(CLIPS[clip].ours)
    return {name: record(inner) for name, record in RECORDS.items()}


def make_step(optimizer: optax.GradientTransformation) -> Step:
    def step(params, opt_state, grads):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def jit_step(optimizer: optax.GradientTransformation) -> jax.stages.Wrapped:
    """Returns the step, with the params and the optimizer's state donated."""
    return jax.jit(make_step(optimizer), donate_argnums=(0, 1))


def make_runner(
    step: jax.stages.Compiled, carry: tuple[Tree, Tree], grads: Tree
) -> Callable[[int], None]:
    """Returns a function that takes so many steps; it goes on where it stopped."""

    def run(calls: int) -> None:
        nonlocal carry
        for _ in range(calls):
            carry = step(*carry, grads)
        jax.block_until_ready(carry)

    return run
