"""Histories of small runs: one that trains, one that explodes, one finite but dead."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from helpers import oc

WIDTHS = (20, 25, 25, 1)  # features, two relu layers, one output
ROWS, BATCH = 512, 32


def data(seed=0):
    """A regression whose targets are as large as they come: their variance is 6e4."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(ROWS, WIDTHS[0]))
    weights = rng.uniform(0, 100, size=WIDTHS[0]) * (rng.random(WIDTHS[0]) < 0.5)
    return jnp.asarray(x, jnp.float32), jnp.asarray(x @ weights, jnp.float32)


def init(seed=0):
    rng = np.random.default_rng(seed)
    bounds = [np.sqrt(6 / rows) for rows in WIDTHS]
    return {
        f"dense_{i}": {
            "kernel": jnp.asarray(rng.uniform(-bound, bound, (a, b)), jnp.float32),
            "bias": jnp.zeros(b),
        }
        for i, (a, b, bound) in enumerate(
            zip(WIDTHS[:-1], WIDTHS[1:], bounds[:-1], strict=True)
        )
    }


def error(params, x, y):
    for i in range(len(params)):
        layer = params[f"dense_{i}"]
        x = x @ layer["kernel"] + layer["bias"]
        x = jax.nn.relu(x) if i < len(params) - 1 else x
    return jnp.mean((x[:, 0] - y) ** 2)


@functools.cache
def histories(max_norms=(7.0, 600.0, np.inf), steps=640, rate=0.01):
    """Trains with a clip at each threshold; returns what was seen, a row for a step."""
    x, y = data()
    rows = np.random.default_rng(1).integers(0, ROWS, size=(steps, BATCH))

    def train(max_norm):
        optimizer = optax.chain(
            oc.clip_by_global_norm(max_norm), optax.sgd(rate, momentum=0.9)
        )

        def step(carry, rows):
            params, state = carry
            loss, grads = jax.value_and_grad(error)(params, x[rows], y[rows])
            updates, state = optimizer.update(grads, state, params)
            norms = jax.tree.map(jnp.linalg.norm, grads)
            seen = {"loss": loss, "norms": norms, "summary": oc.summary(state)}
            return (optax.apply_updates(params, updates), state), seen

        carry = (init(), optimizer.init(init()))
        return jax.lax.scan(step, carry, jnp.asarray(rows))[1]

    seen = jax.device_get(jax.jit(jax.vmap(train))(jnp.array(max_norms)))
    return [columns(seen, i) for i in range(len(max_norms))]


def columns(seen, i):
    """Returns the columns of the history of one run, as `optaxclip.history` would."""
    norms = {
        f"norm/{name}/{key}": layer[key][i]
        for name, layer in seen["norms"].items()
        for key in layer
    }
    loss, clip = seen["loss"][i], {k: x[i] for k, x in seen["summary"].items()}
    clip = {k: clip[k] for k in ("clip/norm", "clip/max_norm", "clip/factor")}
    found = {"loss": loss, "norm": clip["clip/norm"]} | norms | clip
    found = {name: np.asarray(x, float) for name, x in found.items()}
    nonfinite = ~np.isfinite(loss) | ~np.isfinite(found["norm"])
    counts = {
        "step": np.arange(len(loss)),
        "width": np.ones(len(loss)),
        "clipped": found["clip/factor"] < 1,
        "skipped": np.zeros(len(loss)),
        "nonfinite": nonfinite,
    }
    return {name: x.astype(np.int64) for name, x in counts.items()} | found


def good():
    return histories()[0]


def dead():
    return histories()[1]


def exploding():
    return histories()[2]
