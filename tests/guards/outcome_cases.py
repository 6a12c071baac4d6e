"""Optimizers that make of finite updates what is not, for the tests of outcomes."""

import jax
import numpy as np
import pytest

import helpers
from helpers import oc
from optaxclip import norms

bits = helpers.bits
PARAMS = {"a": np.array([1.0, -0.0, 2.0], np.float32), "b": np.ones(2, np.float32)}
ONES = jax.tree.map(np.ones_like, PARAMS)

GUARDS = {
    "nonfinite": oc.skip_if_nonfinite,
    "spike": oc.skip_if_spike,
    "spike of leaves": lambda inner: oc.skip_if_spike(inner, norms.leaf_norms),
}
every_guard = pytest.mark.parametrize("guard", GUARDS.values(), ids=GUARDS)
both_ways = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
