"""The rules that are compared, and the place of each in its optimizer."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _corrupted_tasks import TASKS

import optaxclip
from optaxclip import factors, norms, thresholds

OPTIMIZERS: tuple[str, ...] = ("momentum", "Adam")
MOMENTUM = 0.9
TUNED = "clip_by_global_norm"  # the rule that all others are compared with


class Rule(NamedTuple):
    """A rule and its place in the optimizer."""

    build: Callable[..., Any]  # takes a threshold, if it has one
    place: Callable[..., optax.GradientTransformation]
    grid: Callable[[float], np.ndarray] | None = None  # thresholds to choose from
    optimizers: tuple[str, ...] = OPTIMIZERS


class Moments(NamedTuple):
    """The optimizer without its learning rate; only one of them does anything."""

    adam: optax.GradientTransformation
    momentum: optax.GradientTransformation


def before(rule, moments: Moments, learning_rate) -> optax.GradientTransformation:
    """Clips gradients, before the optimizer's moments see them: the usual place."""
    return optax.chain(rule, *moments, optax.scale(-learning_rate))


def after(rule, moments: Moments, learning_rate) -> optax.GradientTransformation:
    """Clips what the moments made of the gradients, before the learning rate."""
    return optax.chain(*moments, rule, optax.scale(-learning_rate))


def last(rule, moments: Moments, learning_rate) -> optax.GradientTransformation:
    """Clips what is added to the parameters."""
    return optax.chain(*moments, optax.scale(-learning_rate), rule)


def each_step(rule, moments: Moments, learning_rate) -> optax.GradientTransformation:
    """Clips what each gradient adds, before momentum makes a sum of such steps."""
    scale = optax.scale(-learning_rate)
    return optax.chain(moments.adam, scale, rule, moments.momentum)


def instead(make, moments: Moments, learning_rate) -> optax.GradientTransformation:
    """Is the whole optimizer, made from the learning rate."""
    del moments
    return optax.chain(make(1.0), optax.scale(learning_rate))


def try_norms(norm: float) -> np.ndarray:
    """Lists thresholds to try where the norm of a usual gradient is known."""
    return norm * np.logspace(-2.5, 1, 8)


def try_values(norm: float) -> np.ndarray:
    return try_norms(norm) / 40  # about the root of the number of elements


def try_ratios(norm: float) -> np.ndarray:
    del norm
    return np.logspace(-2.5, 1, 8)


# To add a rule, add a line: how to build it, and its place. The first ones have a
# threshold, which is tuned; the others are as published.
RULES: dict[str, Rule] = {
    "none": Rule(optax.identity, before),
    TUNED: Rule(optaxclip.clip_by_global_norm, before, try_norms),
    "clip_by_leaf_norm": Rule(optaxclip.clip_by_leaf_norm, before, try_norms),
    "clip_by_group_norm": Rule(optaxclip.clip_by_group_norm, before, try_norms),
    "clip_by_value": Rule(optaxclip.clip_by_value, before, try_values),
    "normalize_by_update_norm": Rule(
        optaxclip.normalize_by_update_norm, before, try_norms
    ),
    "soften": Rule(
        lambda limit: optaxclip.clip_by(norms.global_norm, limit, factors.soften),
        before,
        try_norms,
    ),
    "adaptive_grad_clip": Rule(optaxclip.adaptive_grad_clip, before, try_ratios),
    "global norm 1": Rule(lambda: optaxclip.clip_by_global_norm(1.0), before),
    "clip_by_block_rms": Rule(lambda: optaxclip.clip_by_block_rms(1.0), after),
    "window_percentile(50)": Rule(
        lambda: by_rule(thresholds.window_percentile(50.0, window=128)), before
    ),
    "streaming_quantile(0.5)": Rule(
        lambda: by_rule(thresholds.streaming_quantile(0.5)), before
    ),
    "autoclip": Rule(optaxclip.autoclip, before),
    "zclip": Rule(optaxclip.zclip, before),
    "zclip, no cap": Rule(lambda: optaxclip.zclip(max_norm=jnp.inf), before),
    "adagc": Rule(optaxclip.adagc, before),
    "adagc, no cap": Rule(lambda: optaxclip.adagc(max_norm=jnp.inf), before),
    "k_sigma_clip": Rule(optaxclip.k_sigma_clip, before),
    "aggc": Rule(optaxclip.aggc, before),
    "stable_spam_clip": Rule(optaxclip.stable_spam_clip, before),
    "spam_clip": Rule(optaxclip.spam_clip, before),
    "u_clip": Rule(
        lambda limit: optaxclip.u_clip(optaxclip.clip_by_global_norm(limit)),
        before,
        try_norms,
    ),
    "acclip": Rule(lambda: acclip, instead, optimizers=("momentum",)),
    "stable_adamw": Rule(lambda: optaxclip.stable_adamw, instead, optimizers=("Adam",)),
    "clippy": Rule(optaxclip.clippy, last),
    "clip_by_relative_step": Rule(optaxclip.clip_by_relative_step, each_step),
    "clip_by_trust_ratio": Rule(optaxclip.clip_by_trust_ratio, after),
    "clip_singular_values": Rule(optaxclip.clip_singular_values, before, try_norms),
    "clip_by_spectral_norm": Rule(optaxclip.clip_by_spectral_norm, before, try_norms),
}


def acclip(learning_rate) -> optax.GradientTransformation:
    """Steps as far as SGD: its momentum is a mean, ten times smaller than a sum."""
    return optax.chain(
        optaxclip.acclip(b1=MOMENTUM), optax.scale(-learning_rate / (1 - MOMENTUM))
    )


def by_rule(rule) -> optax.GradientTransformation:
    return optaxclip.clip_by_global_norm(rule)


def only_if(
    condition, inner: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Does nothing unless the traced condition holds."""

    def update_fn(updates, state, params=None):
        changed, state = inner.update(updates, state, params)
        return jax.tree.map(partial(jnp.where, condition), changed, updates), state

    return optax.GradientTransformation(inner.init, update_fn)


def adam_or_momentum(is_adam) -> Moments:
    """Chooses by a traced number, so that one compiled program trains with both."""
    return Moments(
        only_if(is_adam, optax.scale_by_adam()),
        only_if(jnp.logical_not(is_adam), optax.trace(MOMENTUM)),
    )


class Lane(NamedTuple):
    """One of the runs that one program trains side by side."""

    is_adam: Any
    threshold: Any  # of no meaning for rules without one
    seed: Any


def make_optimizer(task_name: str, rule_name: str, lane: Lane):
    """Puts a rule into its place, and the guard around all of it."""
    rule, rates = RULES[rule_name], TASKS[task_name]().learning_rates
    built = rule.build(lane.threshold) if rule.grid else rule.build()
    rate = jnp.where(lane.is_adam, rates["Adam"], rates["momentum"])
    optimizer = rule.place(built, adam_or_momentum(lane.is_adam), rate)
    return optaxclip.skip_if_nonfinite(optimizer)
