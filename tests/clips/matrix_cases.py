"""Clips of matrices in NumPy, float64, and matrices to run them on."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

import helpers
from helpers import oc


def as_matrices(x):
    x = np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64)
    return x.reshape(-1, *x.shape[-2:]) if x.ndim > 1 else x.reshape(1, -1, 1)


def np_clip_singular_values(x, max_value):
    out = []
    for matrix in as_matrices(x):
        if not np.isfinite(matrix).all():
            out.append(np.full_like(matrix, np.nan))
            continue
        u, s, vh = np.linalg.svd(matrix, full_matrices=False)
        out.append(u @ np.diag(np.minimum(s, max_value)) @ vh)
    return np.reshape(out, np.shape(x))


def np_clip_by_spectral_norm(x, max_norm):
    out = []
    for matrix in as_matrices(x):
        if not np.isfinite(matrix).all():
            out.append(np.full_like(matrix, np.nan))
            continue
        largest = np.linalg.svd(matrix, compute_uv=False)[0]
        out.append(matrix * min(1.0, max_norm / largest if largest else 1.0))
    return np.reshape(out, np.shape(x))


RULES: dict[str, tuple[Any, Any]] = {
    "values": (oc.clip_singular_values, np_clip_singular_values),
    "norm": (
        functools.partial(oc.clip_by_spectral_norm, num_steps=100),
        np_clip_by_spectral_norm,
    ),
}
every_rule = pytest.mark.parametrize("name", RULES)
SHAPES = {"wide": (3, 5), "tall": (6, 2), "stack": (2, 4, 3), "row": (4,), "one": ()}


@functools.cache
def compiled(name):
    def step(updates, threshold):
        clip = RULES[name][0](threshold)
        return clip.update(updates, clip.init(updates))

    return jax.jit(step)


def with_gap(x):
    """The same matrix with a largest singular value well above the second."""
    if x.ndim < 2:
        return x
    u, s, vh = np.linalg.svd(x, full_matrices=False)
    s[..., 0] *= 1.5
    return ((u * s[..., None, :]) @ vh).astype(x.dtype)


def some_updates(scale=1.0, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {
        name: with_gap(scale * rng.normal(size=shape).astype(dtype)).astype(dtype)
        for name, shape in SHAPES.items()
    }


def assert_is(name, clipped, updates, threshold, rtol=2e-6):
    for leaf, x in updates.items():
        expected = RULES[name][1](x, threshold)
        atol = rtol * threshold
        np.testing.assert_allclose(
            helpers.truth(clipped[leaf]), expected, rtol=0, atol=atol, err_msg=leaf
        )
