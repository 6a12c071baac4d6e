"""What `suggest_max_norm` can't answer it says, and what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip

PARAMS = {"w": jnp.ones(3)}
SGD, ADAM = optax.sgd(0.1), optax.adam(1e-3)


def ask_for_more(updates, state, params=None, **told):
    return updates, told["hessian"]


NEEDS_MORE = optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), ask_for_more
)
FROZEN = optax.chain(optax.sgd(0.1), optax.set_to_zero())

ERRORS = {
    "no optimizer": ((0.1, PARAMS), TypeError, r"`optimizer` to be a transf.*got 0\.1"),
    "an optimizer that was not called": (
        (optax.sgd, PARAMS),
        TypeError,
        "`optimizer` to be a transformation.*'sgd' itself",
    ),
    "no arrays": ((SGD, {}), ValueError, "at least one float array.*not empty"),
    "whole numbers": ((SGD, {"n": jnp.ones(3, int)}), ValueError, "one float array"),
    "empty arrays": ((SGD, {"w": jnp.ones((0, 3))}), ValueError, "one float array"),
    "shapes": (
        (SGD, {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}),
        TypeError,
        r"params with values, got ShapeDtypeStruct.*outside of `jit`",
    ),
    "params that are not finite": (
        (SGD, {"w": jnp.array([1.0, jnp.nan])}),
        ValueError,
        "params that are finite.*norm is nan.*began with",
    ),
    "no share": ((SGD, PARAMS, None, -0.1), ValueError, r"share >= 0, got -0\.1"),
    "a share that is no number": ((SGD, PARAMS, None, "1"), TypeError, "share to be"),
    "a learning rate of 0": (
        (optax.sgd(0.0), PARAMS),
        ValueError,
        "that moves the params.*learning rate 0.*frozen",
    ),
    "frozen": ((FROZEN, PARAMS), ValueError, "that moves the params"),
    "a line search": (
        (optax.lbfgs(), PARAMS),
        ValueError,
        "steps follow from its gradients.*line search.*needs no clip",
    ),
    "an optimizer that wants more": (
        (NEEDS_MORE, PARAMS),
        KeyError,
        r"(?s)hessian.*Raised by the optimizer.*value=",
    ),
    "a state for the history": (
        (ADAM, PARAMS, ADAM.init(PARAMS)),
        TypeError,
        r"`history` to be a dict.*got tuple.*`optaxclip.history",
    ),
    "a history without norms": (
        (ADAM, PARAMS, {"loss": np.ones(3), "step": np.arange(3)}),
        ValueError,
        "a column 'norm'.*got 'loss', 'step'",
    ),
    "a history of no step": (
        (ADAM, PARAMS, {"norm": np.ones(0)}),
        ValueError,
        r"vector with finite numbers.*shape \(0,\), 0 of them",
    ),
    "a history of a run that never was finite": (
        (ADAM, PARAMS, {"norm": np.full(3, np.nan)}),
        ValueError,
        r"shape \(3,\), 0 of them finite",
    ),
    "a table for the norms": (
        (ADAM, PARAMS, {"norm": np.ones((3, 2))}),
        ValueError,
        r"a vector.*shape \(3, 2\)",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_answered_says_what_to_do(name):
    args, kind, text = ERRORS[name]
    with pytest.raises(kind, match=text):
        optaxclip.suggest_max_norm(*args)


def test_inside_of_jit_it_asks_to_be_called_outside():
    @jax.jit
    def inside(params):
        return optaxclip.suggest_max_norm(SGD, params)

    with pytest.raises(TypeError, match=r"params with values.*outside of `jit`"):
        inside(PARAMS)
