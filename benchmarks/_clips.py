"""Which clips are compared? All public ones, with rules, guards, records, and peers."""

import functools
from typing import NamedTuple

import optax

import _steps
import optaxclip
from _steps import CLIPS, NO_CLIP, OPTAX, OPTAX_GUARD, OPTIMIZERS, OURS, PASSES
from optaxclip import factors, norms, thresholds

Transformation = optax.GradientTransformation

ALONE = OPTIMIZERS["momentum"][0]
ADAM = 7  # passes: reads gradients, params and two moments, writes the latter three


class Case(NamedTuple):
    """Whole optimizers: without a clip, with Optax's if it has one, and with ours.

    And the passes over memory that ours has to make, each as long as the gradients.
    """

    without: Transformation
    optax: Transformation | None
    ours: Transformation
    passes: int

    def contenders(self) -> dict[str, Transformation]:
        named = {NO_CLIP: self.without, OPTAX: self.optax, OURS: self.ours}
        return {name: tx for name, tx in named.items() if tx is not None}


def with_clip(
    ours: Transformation, peer: Transformation | None = None, passes: int = PASSES + 1
) -> Case:
    """Returns a clip before SGD with momentum, beside Optax's clip of that kind."""
    with_peer = peer and _steps.with_momentum(peer)
    return Case(ALONE, with_peer, _steps.with_momentum(ours), passes)


def with_guard(name: str, optimizer: str = "momentum") -> Case:
    """Returns a clip by the global norm and an optimizer in a guard, or in Optax's."""
    found, (without, _) = _steps.guarded(optimizer), OPTIMIZERS[optimizer]
    passes = {"momentum": PASSES, "adam": ADAM}[optimizer] + 1
    return Case(without, found[OPTAX_GUARD], found[name], passes)


def with_record(clip: str, name: str) -> Case:
    """Returns a clip and SGD with momentum in a record."""
    return Case(ALONE, None, _steps.recorded(clip)[name], PASSES + 1)


# Of these each dtype is compared, where no others are asked for.
MAIN = (*CLIPS, "unit_norm", "normalize")


@functools.cache
def cases() -> dict[str, Case]:
    """Returns all of them by name; some make an array, so JAX has to be set up.

    But `clip_singular_values`: the decomposition is a library's, which a compiler for
    GPU looks for in vain, and beside it nothing counts.
    """
    drop_ins = {name: with_clip(*clip) for name, clip in CLIPS.items()}
    others = _by_size, _by_params, _by_history, _with_arrays, _around
    return drop_ins | {name: case for more in others for name, case in more().items()}


def _by_size() -> dict[str, Case]:
    """Fixed thresholds: other norms, other factors."""
    by, ours = optaxclip.clip_by, optaxclip.normalize_by_update_norm(1.0)
    four_steps = 2 * 4  # of the power iteration, each of two products
    return {
        "unit_norm": with_clip(by(norms.unit_norms, 0.1)),
        "spectral_norm": with_clip(
            optaxclip.clip_by_spectral_norm(0.1), passes=PASSES + four_steps
        ),
        "normalize": with_clip(ours, optax.normalize_by_update_norm(1.0)),
        "drop": with_clip(by(norms.leaf_norms, 0.1, factor=factors.drop)),
        "soften": with_clip(by(norms.global_norm, 0.1, factor=factors.soften)),
    }


def _by_params() -> dict[str, Case]:
    """Thresholds that look at the params, and so take one more pass."""
    relative = thresholds.relative_to_params(0.01, norms.leaf_norms)
    clips = {
        "relative_step": (optaxclip.clip_by_relative_step(), None),
        "relative_to_params": (optaxclip.clip_by(norms.leaf_norms, relative), None),
        "trust_ratio": (optaxclip.clip_by_trust_ratio(), optax.scale_by_trust_ratio()),
        "clippy": (optaxclip.clippy(), None),
    }
    return {name: with_clip(*pair, passes=PASSES + 2) for name, pair in clips.items()}


def _by_history() -> dict[str, Case]:
    """Thresholds that remember norms."""
    quantile = thresholds.streaming_quantile(0.9, 0.1)
    clips = {
        "autoclip": optaxclip.autoclip(),
        "zclip": optaxclip.zclip(),
        "k_sigma": optaxclip.k_sigma_clip(),
        "streaming_quantile": optaxclip.clip_by(norms.global_norm, quantile),
        "adagc": optaxclip.adagc(),
        "aggc": optaxclip.aggc(),
    }
    # The norm of what is left of the elements: the largest, the norm, the product.
    stable = with_clip(optaxclip.stable_spam_clip(), passes=PASSES + 2)
    found = {name: with_clip(clip) for name, clip in clips.items()}
    return found | {"stable_spam": stable}


def _with_arrays() -> dict[str, Case]:
    """Clips that keep an array for each leaf: it is read and written."""
    inner = CLIPS["global_norm"].ours
    reset = optaxclip.reset_momentum(_steps.with_momentum(inner))
    adamw = optaxclip.stable_adamw(0.01)
    return {
        "spam": with_clip(optaxclip.spam_clip(), passes=PASSES + 2),
        "acclip": with_clip(optaxclip.acclip(), passes=PASSES + 4),
        # The sum with what was carried has two operands, and is computed twice.
        "u_clip": with_clip(optaxclip.u_clip(inner), passes=PASSES + 4),
        "reset_momentum": Case(ALONE, None, reset, PASSES + 1),
        # The rms of a ratio of two.
        "stable_adamw": Case(optax.adamw(0.01), None, adamw, ADAM + 2),
    }


def _around() -> dict[str, Case]:
    """Guards, what is done to gradients before a clip, and records."""
    by_value = optaxclip.zero_nonfinite(), optax.zero_nans()
    return {
        "zero_nonfinite": with_clip(*by_value, passes=PASSES),
        "unscale": with_clip(optaxclip.unscale(1024.0), passes=PASSES),
        "skip_if_nonfinite": with_guard("skip_if_nonfinite"),
        "skip_if_spike": with_guard("skip_if_spike"),
        "skip_if_nonfinite_adam": with_guard("skip_if_nonfinite", "adam"),
        "skip_if_spike_adam": with_guard("skip_if_spike", "adam"),
        "record": with_record("global_norm", _steps.RECORD),
        "record_global_norm": with_record("global_norm", "record, global norm"),
        "record_leaf_norm": with_record("leaf_norm", _steps.RECORD),
    }
