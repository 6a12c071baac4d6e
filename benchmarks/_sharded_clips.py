"""Which clips are compared between a mesh and a single device?"""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import optaxclip
from _steps import OPTAX, OURS
from optaxclip import factors, norms, thresholds

Make = Callable[[Any], optax.GradientTransformation]


class Clip(NamedTuple):
    """Our clip and Optax's, functions of what their thresholds are multiplied by."""

    ours: Make
    optax: Make | None = None
    needs_specs: bool = False  # types don't tell how its units are split
    steps: int = 1

    def contenders(self) -> dict[str, Make]:
        return {OURS: self.ours} | ({OPTAX: self.optax} if self.optax else {})


def lagged(t: Any) -> optax.GradientTransformation:
    """Allows a tenth of the average norm so far, which has the updates' size."""
    del t
    rule = optax.chain(optax.ema(0.9), optax.scale(0.1))
    return optaxclip.clip_by(norms.leaf_norms, thresholds.lagged(rule))


CLIPS = {
    "value": Clip(lambda t: optaxclip.clip(0.5 * t), lambda t: optax.clip(0.5 * t)),
    "global_norm": Clip(optaxclip.clip_by_global_norm, optax.clip_by_global_norm),
    "leaf_norm": Clip(optaxclip.clip_by_leaf_norm),
    "per_layer": Clip(lambda t: optaxclip.clip_by_leaf_norm({"in": t, "**": 3 * t})),
    "group_norm": Clip(optaxclip.clip_by_group_norm),
    "block_rms": Clip(
        lambda t: optaxclip.clip_by_block_rms(0.1 * t),
        lambda t: optax.clip_by_block_rms(0.1 * t),
    ),
    "adaptive": Clip(
        lambda t: optaxclip.adaptive_grad_clip(0.01 * t),
        lambda t: optax.adaptive_grad_clip(0.01 * t),
        needs_specs=True,
    ),
    "soften": Clip(lambda t: optaxclip.clip_by(norms.global_norm, t, factors.soften)),
    "lagged": Clip(lagged, steps=2),
}
