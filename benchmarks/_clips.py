"""Which clips are compared? All public ones, with rules, guards, records, and peers."""

import functools
from typing import NamedTuple

import optax

import _steps
import optaxclip
from _steps import CLIPS, NO_CLIP, OPTAX, OPTAX_GUARD, OPTIMIZERS, OURS
from optaxclip import factors, norms, thresholds

Transformation = optax.GradientTransformation

ALONE = OPTIMIZERS["momentum"][0]


class Case(NamedTuple):
    """Whole optimizers: without a clip, with Optax's if it has one, and with ours."""

    without: Transformation
    optax: Transformation | None
    ours: Transformation

    def contenders(self) -> dict[str, Transformation]:
        named = {NO_CLIP: self.without, OPTAX: self.optax, OURS: self.ours}
        return {name: tx for name, tx in named.items() if tx is not None}


def with_clip(ours: Transformation, peer: Transformation | None = None) -> Case:
    """Returns a clip before SGD with momentum, beside Optax's clip of that kind."""
    return Case(ALONE, peer and _steps.with_momentum(peer), _steps.with_momentum(ours))


def with_guard(name: str, optimizer: str = "momentum") -> Case:
    """Returns a clip by the global norm and an optimizer in a guard, or in Optax's."""
    found = _steps.guarded(optimizer)
    return Case(OPTIMIZERS[optimizer][0], found[OPTAX_GUARD], found[name])


def with_record(clip: str, name: str) -> Case:
    """Returns a clip and SGD with momentum in a record."""
    return Case(ALONE, None, _steps.recorded(clip)[name])


# Of these each dtype is compared, where no others are asked for.
MAIN = (*CLIPS, "unit_norm", "normalize")


@functools.cache
def cases() -> dict[str, Case]:
    """Returns all of them by name; some make an array, so JAX has to be set up."""
    return {
        **{name: with_clip(clip.ours, clip.optax) for name, clip in CLIPS.items()},
        # Norms
        "unit_norm": with_clip(optaxclip.clip_by(norms.unit_norms, 0.1)),
        "spectral_norm": with_clip(optaxclip.clip_by_spectral_norm(0.1)),
        "singular_values": with_clip(optaxclip.clip_singular_values(0.1)),
        # Factors
        "normalize": with_clip(
            optaxclip.normalize_by_update_norm(1.0), optax.normalize_by_update_norm(1.0)
        ),
        "drop": with_clip(
            optaxclip.clip_by(norms.leaf_norms, 0.1, factor=factors.drop)
        ),
        "soften": with_clip(
            optaxclip.clip_by(norms.global_norm, 0.1, factor=factors.soften)
        ),
        # Thresholds that look at the params
        "relative_step": with_clip(optaxclip.clip_by_relative_step()),
        "trust_ratio": with_clip(
            optaxclip.clip_by_trust_ratio(), optax.scale_by_trust_ratio()
        ),
        "relative_to_params": with_clip(
            optaxclip.clip_by(
                norms.leaf_norms, thresholds.relative_to_params(0.01, norms.leaf_norms)
            )
        ),
        "clippy": with_clip(optaxclip.clippy()),
        # Thresholds that remember norms
        "autoclip": with_clip(optaxclip.autoclip()),
        "zclip": with_clip(optaxclip.zclip()),
        "k_sigma": with_clip(optaxclip.k_sigma_clip()),
        "streaming_quantile": with_clip(
            optaxclip.clip_by(
                norms.global_norm, thresholds.streaming_quantile(0.9, 0.1)
            )
        ),
        "adagc": with_clip(optaxclip.adagc()),
        "aggc": with_clip(optaxclip.aggc()),
        "stable_spam": with_clip(optaxclip.stable_spam_clip()),
        # Those that remember an array like the params
        "spam": with_clip(optaxclip.spam_clip()),
        "acclip": with_clip(optaxclip.acclip()),
        "u_clip": with_clip(optaxclip.u_clip(CLIPS["global_norm"].ours)),
        "reset_momentum": Case(
            ALONE,
            None,
            optaxclip.reset_momentum(_steps.with_momentum(CLIPS["global_norm"].ours)),
        ),
        "stable_adamw": Case(
            optax.adamw(0.01), None, optaxclip.stable_adamw(0.01, weight_decay=1e-4)
        ),
        # Guards, and what looks on
        "zero_nonfinite": with_clip(optaxclip.zero_nonfinite(), optax.zero_nans()),
        "unscale": with_clip(optaxclip.unscale(1024.0)),
        "skip_if_nonfinite": with_guard("skip_if_nonfinite"),
        "skip_if_spike": with_guard("skip_if_spike"),
        "skip_if_nonfinite_adam": with_guard("skip_if_nonfinite", "adam"),
        "skip_if_spike_adam": with_guard("skip_if_spike", "adam"),
        "record": with_record("global_norm", _steps.RECORD),
        "record_global_norm": with_record("global_norm", "record, global norm"),
        "record_leaf_norm": with_record("leaf_norm", _steps.RECORD),
    }
