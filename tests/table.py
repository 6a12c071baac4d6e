"""The table of all clips, each with its reference: a new clip is a row here."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers import Clip, Tree, all_but, oc, random_tree, run, three_steps
from in_numpy import (
    acclip_step,
    adam_step,
    agc_excluding_the_head,
    by_element,
    by_label,
    by_matrix,
    by_prefix,
    by_unit,
    clippy,
    constant,
    each_by_itself,
    each_leaf,
    every_leaf_together,
    finite_leaves_together,
    layer,
    np_drop,
    np_normalize,
    np_rescale,
    np_soften,
    params_norm_or_none,
    rms,
    unclipped,
    unclipped_together,
    vector_norm,
    weights_or_rest,
)
from optaxclip import factors, norms, thresholds


class Row(NamedTuple):
    """How to build a clip with its thresholds times `t`, and its first step."""

    make: Callable[..., Clip]
    reference: Callable[[Tree, Tree], Tree]


def twice_the_leaf_norm(updates):
    """A norm as a user writes one: any tree of homogeneous sizes."""
    return jax.tree.map(lambda norm: 2 * norm, norms.leaf_norms(updates))


def labels_by_rank(updates):
    return jax.tree.map(lambda x: "weights" if jnp.ndim(x) > 1 else "rest", updates)


def ema_times(factor):
    """A rule made of Optax's own pieces: a multiple of the average norm."""
    return optax.chain(optax.ema(0.9), optax.scale(factor))


def ord_norm(norm, ord):
    return functools.partial(norm, ord=ord)


def mapping_max_value(path: str) -> tuple[float, float]:
    return (-0.25, 0.25) if path.startswith("dense/") else (-1.0, 1.0)


def asymmetric(path: str) -> tuple[float, float]:
    return (-0.25, 0.5)


def unlimited(path: str) -> tuple[float, float]:
    return (-np.inf, np.inf)


TABLE: dict[str, Row] = {
    "acclip": Row(lambda t=1.0: oc.acclip(), each_by_itself(acclip_step)),
    "value": Row(
        lambda t=1.0: oc.clip_by_value(0.5 * t),
        by_element(lambda _: (-0.5, 0.5)),
    ),
    "value_asymmetric": Row(
        lambda t=1.0: oc.clip_by_value((-0.25 * t, 0.5 * t)),
        by_element(asymmetric),
    ),
    "value_schedule": Row(
        lambda t=1.0: oc.clip_by_value(lambda count: 0.5 * t / (1 + count)),
        by_element(lambda _: (-0.5, 0.5)),
    ),
    "value_mapping": Row(
        lambda t=1.0: oc.clip_by_value({"dense": 0.25 * t, "**": 1.0 * t}),
        by_element(mapping_max_value),
    ),
    "global_norm": Row(
        lambda t=1.0: oc.clip_by_global_norm(1.0 * t),
        by_label(every_leaf_together, constant(1.0)),
    ),
    "global_norm_schedule": Row(
        lambda t=1.0: oc.clip_by_global_norm(lambda count: t / (1 + count)),
        by_label(every_leaf_together, constant(1.0)),
    ),
    "global_norm_array": Row(
        lambda t=1.0: oc.clip_by_global_norm(jnp.asarray(t, jnp.bfloat16)),
        by_label(every_leaf_together, constant(1.0)),
    ),
    "global_norm_ord_3": Row(
        lambda t=1.0: oc.clip_by(ord_norm(norms.global_norm, 3), 1.0 * t),
        by_label(
            every_leaf_together,
            constant(1.0),
            size=functools.partial(vector_norm, ord=3),
        ),
    ),
    "normalize": Row(
        lambda t=1.0: oc.clip_by(norms.global_norm, 1.0 * t, factor=factors.normalize),
        by_label(every_leaf_together, constant(1.0), factor=np_normalize),
    ),
    "drop": Row(
        lambda t=1.0: oc.clip_by(norms.leaf_norms, 2.0 * t, factor=factors.drop),
        by_label(each_leaf, constant(2.0), factor=np_drop),
    ),
    "soften": Row(
        lambda t=1.0: oc.clip_by(norms.global_norm, 1.0 * t, factor=factors.soften),
        by_label(every_leaf_together, constant(1.0), factor=np_soften),
    ),
    "leaf_norm": Row(
        lambda t=1.0: oc.clip_by_leaf_norm(1.0 * t),
        by_label(each_leaf, constant(1.0)),
    ),
    "leaf_norm_mapping": Row(
        lambda t=1.0: oc.clip_by_leaf_norm({"dense": 0.5 * t, "**": 2.0 * t}),
        by_label(each_leaf, by_prefix({"dense/": 0.5}, 2.0)),
    ),
    "leaf_norm_ord_inf": Row(
        lambda t=1.0: oc.clip_by(ord_norm(norms.leaf_norms, float("inf")), 0.5 * t),
        by_label(
            each_leaf, constant(0.5), size=functools.partial(vector_norm, ord=np.inf)
        ),
    ),
    "user_norm": Row(
        lambda t=1.0: oc.clip_by(twice_the_leaf_norm, 1.0 * t),
        by_label(each_leaf, constant(0.5)),
    ),
    "layer_norm": Row(
        lambda t=1.0: oc.clip_by_group_norm(1.0 * t),
        by_label(layer, constant(1.0)),
    ),
    "group_norm_mapping": Row(
        lambda t=1.0: oc.clip_by_group_norm(
            1.0 * t, {"kernel": "weights", "**": "rest"}
        ),
        by_label(weights_or_rest, constant(1.0)),
    ),
    "group_norm_callable": Row(
        lambda t=1.0: oc.clip_by_group_norm(1.0 * t, labels_by_rank),
        by_label(weights_or_rest, constant(1.0)),
    ),
    "block_rms": Row(
        lambda t=1.0: oc.clip_by_block_rms(0.5 * t),
        by_label(each_leaf, constant(0.5), size=rms),
    ),
    "unit_norm": Row(
        lambda t=1.0: oc.clip_by(norms.unit_norms, 1.0 * t),
        by_unit(lambda _: 1.0),
    ),
    "agc": Row(
        lambda t=1.0: oc.adaptive_grad_clip(0.25 * t),
        by_unit(lambda norm: 0.25 * np.maximum(norm, 1e-3)),
    ),
    "agc_excluding": Row(
        lambda t=1.0: oc.adaptive_grad_clip(
            0.25 * t, axis={"kernel": 1, "**": None}, exclude=("head",)
        ),
        agc_excluding_the_head,
    ),
    "normalize_by_update_norm": Row(
        lambda t=1.0: oc.normalize_by_update_norm(1.0 * t),
        by_label(
            every_leaf_together,
            constant(1.0),
            factor=lambda norm, max_norm: max_norm / (norm + 1e-6),
        ),
    ),
    "relative_to_params": Row(
        lambda t=1.0: oc.clip_by(
            norms.leaf_norms, thresholds.relative_to_params(0.25 * t, norms.leaf_norms)
        ),
        by_label(
            each_leaf,
            lambda _, norm, params: 0.25 * max(vector_norm(params), 1e-3),
        ),
    ),
    "relative_step": Row(
        lambda t=1.0: oc.clip_by_relative_step(0.25 * t),
        by_label(
            every_leaf_together,
            lambda _, norm, params: 0.25 * max(vector_norm(params), 1.0),
        ),
    ),
    "trust_ratio": Row(
        lambda t=1.0: oc.clip_by_trust_ratio(1.0, 1.0 * t),
        by_label(each_leaf, params_norm_or_none),
    ),
    "clippy": Row(lambda t=1.0: oc.clippy(0.25 * t, 0.5 * t), clippy),
    "singular_values": Row(
        lambda t=1.0: oc.clip_singular_values(1.0 * t),
        by_matrix(lambda x, u, s, vh: u * np.minimum(s, 1.0) @ vh),
    ),
    "spectral_norm": Row(
        lambda t=1.0: oc.clip_by_spectral_norm(1.0 * t, 1000),
        by_matrix(lambda x, u, s, vh: x * np_rescale(s[0], 1.0)),
    ),
    "bare_rule": Row(
        lambda t=1.0: oc.clip_by(norms.leaf_norms, optax.scale(0.5 * t)),
        by_label(each_leaf, lambda _, norm, params: 0.5 * norm),
    ),
    "lagged_global": Row(
        lambda t=1.0: oc.clip_by(
            norms.global_norm, thresholds.lagged(ema_times(0.5 * t))
        ),
        unclipped_together,
    ),
    "lagged_leaf": Row(
        lambda t=1.0: oc.clip_by(
            norms.leaf_norms, thresholds.lagged(ema_times(0.5 * t))
        ),
        unclipped,
    ),
    "clipped_history": Row(
        lambda t=1.0: oc.clip_by(
            norms.leaf_norms,
            thresholds.clipped_history(thresholds.lagged(ema_times(0.5 * t))),
        ),
        unclipped,
    ),
    "mean_plus_std": Row(
        lambda t=1.0: oc.clip_by(
            norms.group_norms(),
            thresholds.lagged(
                optax.chain(
                    thresholds.mean_plus_std(1.0, decay=0.9), optax.scale(0.5 * t)
                )
            ),
        ),
        by_label(layer, constant(np.inf)),
    ),
    "window_percentile": Row(
        lambda t=1.0: oc.clip_by(
            norms.leaf_norms,
            optax.chain(thresholds.window_percentile(50.0, 4), optax.scale(0.5 * t)),
        ),
        by_label(each_leaf, lambda _, norm, params: 0.5 * norm),
    ),
    "streaming_quantile": Row(
        lambda t=1.0: oc.clip_by(
            norms.global_norm, thresholds.streaming_quantile(0.5, 0.2, initial=1.0 * t)
        ),
        by_label(every_leaf_together, constant(1.0)),
    ),
    "autoclip": Row(lambda t=1.0: oc.autoclip(50.0, 4), unclipped_together),
    "zclip": Row(
        lambda t=1.0: oc.zclip(2.5, 0.97, 2, max_norm=1.0 * t),
        by_label(every_leaf_together, constant(1.0)),
    ),
    "adagc": Row(
        lambda t=1.0: oc.adagc(warmup_steps=1, max_norm=1.0 * t),
        finite_leaves_together,
    ),
    "k_sigma_clip": Row(
        lambda t=1.0: oc.k_sigma_clip(1.0, decay=0.9, warmup_steps=1),
        unclipped_together,
    ),
    "aggc": Row(lambda t=1.0: oc.aggc(1.0, 0.5), by_label(layer, constant(np.inf))),
    "stable_spam_clip": Row(
        lambda t=1.0: oc.stable_spam_clip(),
        by_label(each_leaf, constant(1.0), factor=np_normalize),
    ),
    "mapping_of_rules": Row(
        lambda t=1.0: oc.clip_by(
            norms.leaf_norms,
            {"dense": thresholds.lagged(ema_times(0.5 * t)), "**": 1.0 * t},
        ),
        by_label(each_leaf, by_prefix({"dense/": np.inf}, 1.0)),
    ),
    "spam": Row(
        lambda t=1.0: oc.spam_clip(0.25 * t, 0.9, warmup_steps=1, reset_every=3),
        by_element(unlimited),  # nothing is known of any element
    ),
    "stable_adamw": Row(
        lambda t=1.0: oc.stable_adamw(0.5 * t, weight_decay=0.0),
        each_by_itself(adam_step),
    ),
    "u_clip": Row(
        lambda t=1.0: oc.reset_momentum(
            oc.u_clip(oc.clip_by_global_norm(1.0 * t)), every=2, warmup_steps=1
        ),
        by_label(every_leaf_together, constant(1.0)),
    ),
}

clips: dict[str, Callable[..., Clip]] = {name: row.make for name, row in TABLE.items()}
references = {name: row.reference for name, row in TABLE.items()}

# One of each kind: each norm, factor, memory and kind of threshold is in one of them.
# The others repeat their parts in other combinations: these tests are `thorough`.
KINDS = (
    *("value", "global_norm", "global_norm_schedule", "normalize", "drop", "soften"),
    *("leaf_norm", "user_norm", "group_norm_mapping", "block_rms", "agc", "clippy"),
    *("singular_values", "spectral_norm", "zclip", "mapping_of_rules"),
    *("acclip", "spam", "stable_adamw", "u_clip"),
)
# What sums as none of these does, over updates or over params.
NORMS_OF_THEIR_OWN = (
    *("global_norm_ord_3", "leaf_norm_ord_inf", "layer_norm", "unit_norm"),
    *("agc_excluding", "relative_to_params", "relative_step"),
)
assert {*KINDS, *NORMS_OF_THEIR_OWN} <= set(clips)

# Clips of single elements: their scope is the element, they carry no norm.
ELEMENTWISE = tuple(name for name in clips if name.startswith("value"))

# What keeps arrays like the params in its state, and no statistics of its own.
REMEMBERING = ("acclip", "spam", "stable_adamw", "u_clip")


def every_clip(exempt: Mapping[str, str] | None = None):
    """Parametrizes `name` over the table, less the named rows (name: reason)."""
    exempt = exempt or {}
    unknown = set(exempt) - set(clips)
    assert not unknown, f"exempt, but not in the table: {unknown}"
    names = [name for name in clips if name not in exempt]
    return pytest.mark.parametrize("name", all_but(names, KINDS))


# Every compiled clip costs about half a second, so the tests share them.
def first_step(name: str, dtype: str = "float32") -> Callable[..., Any]:
    """Compiled `(updates, params, t) -> (updates, state)` from a fresh state."""
    # Always given: the cache takes an argument left to its default for another one.
    return _first_step(name, dtype)


@functools.cache
def _first_step(name: str, dtype: str) -> Callable[..., Any]:
    del dtype  # one compiled step per dtype anyway; named so that x64 can't share it

    @jax.jit
    def step(updates, params, t):
        clip = clips[name](t)
        return clip.update(updates, clip.init(params), params)

    # Always traced: an argument left to its default would be compiled a second time.
    return lambda updates, params, t=1.0: step(updates, params, t)


@functools.cache
def jitted_run(name: str) -> tuple[Clip, list, Any, Tree]:
    """`run` over `three_steps`, compiled once: the clip, updates, the state, params.

    Updates and state are donated: that this is possible is what it shows as well.
    """
    clip, params = clips[name](), random_tree(seed=9)
    chex.clear_trace_counter()
    once = chex.assert_max_traces(clip.update, n=1)
    update = jax.jit(once, donate_argnums=(0, 1))
    return clip, *run(clip, update, three_steps(), params), params
