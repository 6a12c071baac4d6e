"""Cases that the tests of numbers share."""

import numpy as np

import helpers


def many_leaves(dtype, sizes) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [helpers.random_leaf(rng, (size,), dtype) for size in sizes]
