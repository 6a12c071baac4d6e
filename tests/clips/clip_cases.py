"""What these tests share."""

import functools
from typing import Any

import jax
import optax

from helpers import oc


def clipped(clip, updates, params=None):
    return clip.update(updates, clip.init(updates), params)[0]


@functools.cache
def both(name, arguments):
    """One compiled step of our function and of Optax's."""
    ours: Any = getattr(oc, name)(*arguments)
    theirs: Any = getattr(optax, name)(*arguments)

    def step(updates, params):
        return (
            ours.update(updates, ours.init(params), params)[0],
            theirs.update(updates, theirs.init(params), params)[0],
        )

    return jax.jit(step)
