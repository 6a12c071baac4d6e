"""What the threshold of a guard goes by: a spike must not raise its own."""

from collections.abc import Mapping
from typing import Any

import optax

from optaxclip import thresholds


def is_learnt(threshold: Any) -> bool:
    """Returns whether any of it is a rule."""
    if isinstance(threshold, Mapping):
        return any(map(is_learnt, threshold.values()))
    return isinstance(threshold, optax.GradientTransformation)


def by_the_past(threshold: Any) -> Any:
    """Makes rules go by the steps before this one."""
    if isinstance(threshold, optax.GradientTransformation):
        return thresholds.lagged(threshold)
    if isinstance(threshold, Mapping):
        return {pattern: by_the_past(entry) for pattern, entry in threshold.items()}
    return threshold
