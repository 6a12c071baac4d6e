"""Which clips have no threshold to set, and how are they placed around an optimizer?"""

import math
from collections.abc import Callable
from functools import partial

import optax
from _task_parts import momentum

import optaxclip
from optaxclip import norms, thresholds

TUNED = "clip_by_global_norm"

Place = Callable[..., optax.GradientTransformation]


def before(rule: Callable[..., optax.GradientTransformation]) -> Place:
    """Clips the gradients."""

    def build(moments, rate, threshold):
        del threshold
        return optax.chain(rule(), moments(), optax.scale(-rate))

    return build


def by(rule) -> Place:
    """Clips the global norm of the gradients by a rule."""
    return before(lambda: optaxclip.clip_by_global_norm(rule))


def tuned(moments, rate, threshold) -> optax.GradientTransformation:
    clip = optaxclip.clip_by_global_norm(threshold)
    return optax.chain(clip, moments(), optax.scale(-rate))


def median_times(factor: float, window: int = 128) -> optax.GradientTransformation:
    """Allows a multiple of the median of the norms before this one."""
    median = thresholds.window_percentile(50.0, window)
    return thresholds.lagged(optax.chain(median, optax.scale(factor)))


def step_within(
    bound: Callable[..., optax.GradientTransformation],
    first: Callable[..., optax.GradientTransformation] = optax.identity,
) -> Place:
    """Bounds what each gradient adds to the parameters.

    Momentum is a sum of such steps, and Adam's step has no parts: the whole is bounded.
    """

    def build(moments, rate, threshold):
        del threshold
        ends = optax.scale(-rate), bound()
        if moments is momentum:
            return optax.chain(first(), *ends, moments())
        return optax.chain(first(), moments(), *ends)

    return build


def constant(share: float) -> Callable[..., optax.GradientTransformation]:
    """Bounds a step by a share of the norm of the parameters that stays the same."""
    norm = norms.global_norm
    return lambda: optaxclip.clip_by(norm, thresholds.relative_to_params(share, norm))


def by_optimizer(share: float) -> Place:
    """Bounds the step of SGD, and clips what Adam gets to the median of the norms."""
    step = step_within(partial(optaxclip.clip_by_relative_step, share))
    median = by(thresholds.streaming_quantile(0.5))

    def build(moments, rate, threshold):
        rule = step if moments is momentum else median
        return rule(moments, rate, threshold)

    return build


def autoclip(percentile: float) -> optax.GradientTransformation:
    return optaxclip.autoclip(percentile, window=512)  # more than there are steps


CANDIDATES: dict[str, Place] = {
    TUNED: tuned,
    "none": before(optax.identity),
    "global norm 1": by(1.0),
    "normalize_by_update_norm": before(optaxclip.normalize_by_update_norm),
    **{f"autoclip({p})": before(partial(autoclip, p)) for p in (10, 50, 90)},
    "streaming_quantile(0.5)": by(thresholds.streaming_quantile(0.5)),
    "streaming_quantile(0.1)": by(thresholds.streaming_quantile(0.1)),
    "k_sigma_clip(3)": before(lambda: optaxclip.k_sigma_clip(3.0, window=128)),
    "zclip, no cap": before(lambda: optaxclip.zclip(max_norm=math.inf)),
    "zclip": before(optaxclip.zclip),
    "adagc, no cap": before(lambda: optaxclip.adagc(max_norm=math.inf)),
    "adagc": before(optaxclip.adagc),
    "stable_spam_clip": before(optaxclip.stable_spam_clip),
    **{f"lagged median x {k}": by(median_times(k)) for k in (1, 2)},
    **{f"step <= {x} %": step_within(constant(x / 100)) for x in (0.2, 0.3, 0.4)},
    "relative step": step_within(optaxclip.clip_by_relative_step),
    "autoclip(10), relative step": step_within(
        optaxclip.clip_by_relative_step, partial(autoclip, 10)
    ),
    **{f"by optimizer, {x} %": by_optimizer(x / 100) for x in (3, 4, 6)},
}
QUICK = ("none", "autoclip(10)", "by optimizer, 3 %")
