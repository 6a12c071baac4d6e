"""An Optax chain trains a Keras model by `fit` as Keras' own optimizer does."""

import pathlib
import re
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import optaxclip

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "trainers.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def page():
    """What the page defines up to its Keras optimizer."""
    names: dict[str, Any] = {}
    keras = [code for code in BLOCKS if "keras" in code][:2]
    for code in [BLOCKS[0], *keras]:
        exec(compile(code, PAGE.name, "exec"), names)
    return names


def fit(page, optimizer, y):
    """The weights after three epochs of eight steps."""
    model = page["make_model"]()
    model.compile(optimizer, "mse")
    model.fit(page["x"], y, batch_size=32, epochs=3, verbose=0)
    return [variable.value for variable in model.trainable_variables]


def test_a_chain_in_keras_takes_the_steps_of_keras(page):
    options = {"momentum": 0.9, "global_clipnorm": 1.0}
    theirs = page["keras"].optimizers.SGD(0.01, **options)
    expected = fit(page, theirs, page["y"])
    found = fit(page, page["Optax"](page["make_optimizer"]()), page["y"])
    for weight, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(weight, right, rtol=1e-4, atol=1e-6)


def test_a_guard_in_keras_skips_the_bad_batch_of_each_epoch(page):
    y = page["y"].at[0].set(jnp.nan)
    optimizer = page["Optax"](page["make_optimizer"]())
    chex.assert_tree_all_finite(fit(page, optimizer, y))
    seen = optaxclip.summary(optimizer.opt_state)
    assert seen["guard/skipped_count"] == 3
    assert seen["clip/update_count"] == 3 * 7
