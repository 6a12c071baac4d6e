"""Stacks of layers, and the same layers apart."""

import functools

import jax
import optax

import helpers
from helpers import oc
from optaxclip import factors, norms, thresholds

LAYERS = 4
SHAPES = {
    "blocks": {
        "attention": {"bias": (LAYERS, 2), "kernel": (LAYERS, 4, 2)},
        "scale": (LAYERS, 4),
    },
    "embed": {"kernel": (5, 4)},
}
STACKS = {"blocks": 0}


def trees(seed=0, spike=100.0):
    """Updates with a spike in one layer, and params."""
    updates = helpers.random_tree(seed=seed, shapes=SHAPES)
    blocks = jax.tree.map(lambda x: x.at[1].multiply(spike), updates["blocks"])
    return updates | {"blocks": blocks}, helpers.random_tree(seed=9, shapes=SHAPES)


def twice_the_leaf_norms(updates):
    return jax.tree.map(lambda norm: 2 * norm, norms.leaf_norms(updates))


def of_order(norm, ord):
    return functools.partial(norm, ord=ord)


MAKERS = {
    "leaf_norm": lambda: oc.clip_by_leaf_norm(1.0),
    "leaf_norm_of_order_3": lambda: oc.clip_by(of_order(norms.leaf_norms, 3), 1.0),
    "largest": lambda: oc.clip_by(of_order(norms.leaf_norms, float("inf")), 0.5),
    "group_norm": lambda: oc.clip_by_group_norm(1.0),
    "block_rms": lambda: oc.clip_by_block_rms(0.5),
    "global_norm": lambda: oc.clip_by_global_norm(1.0),
    "excluding": lambda: oc.clip_by(norms.excluding(norms.leaf_norms, "bias"), 1.0),
    "drop": lambda: oc.clip_by(norms.group_norms(), 20.0, factors.drop),
    "user_norm": lambda: oc.clip_by(
        twice_the_leaf_norms, thresholds.lagged(optax.scale(0.5))
    ),
    "agc": lambda: oc.adaptive_grad_clip(0.01),
    "agc_excluding": lambda: oc.adaptive_grad_clip(0.01, exclude=("embed",)),
    "agc_axis": lambda: oc.adaptive_grad_clip(0.01, axis={"kernel": 1}),
    "adagc": lambda: oc.adagc(warmup_steps=1),
    "aggc": lambda: oc.aggc(1.0, 0.5),
    "z_score": lambda: oc.clip_by(
        norms.group_norms(), thresholds.z_score(0.5, warmup_steps=2)
    ),
    "window": lambda: oc.clip_by(
        norms.leaf_norms,
        thresholds.lagged(thresholds.mean_plus_std(0.5, window=2)),
    ),
    "mapping": lambda: oc.clip_by_leaf_norm(
        {"kernel": thresholds.lagged(optax.scale(0.5)), "**": 1.0}
    ),
    "trust_ratio": lambda: oc.clip_by_trust_ratio(),
    "clippy": lambda: oc.clippy(),
    "value": lambda: oc.clip_by_value(0.5),
    "stable_spam": lambda: oc.stable_spam_clip(),
    "stable_adamw": lambda: oc.stable_adamw(0.1),
    "in_a_chain": lambda: optax.chain(oc.clip_by_group_norm(1.0), optax.sgd(0.1)),
    "guard": lambda: oc.skip_if_spike(optax.sgd(0.1), norms.leaf_norms, 50.0),
}
