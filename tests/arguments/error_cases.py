"""What these tests share."""

import jax.numpy as jnp

TREE = {"dense": {"bias": jnp.ones(2), "kernel": jnp.ones((3, 2))}}


def update(clip, updates, params=None):
    return clip.update(updates, clip.init(updates), params)


def says(error, *parts):
    """Every informative part of the message is there, and it ends as a sentence."""
    text = str(error.value)
    missing = [part for part in parts if part not in text]
    assert not missing, f"{missing} not in: {text}"
    assert text.rstrip().endswith((".", "]", "}", "?", "`")), text
