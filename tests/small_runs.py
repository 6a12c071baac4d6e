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


@functools.lru_cache
def history(max_norm, steps=640, rate=0.01):
    """Trains with a clip at `max_norm`; returns what was seen, a row for each step."""
    x, y = data()
    optimizer = optax.chain(
        oc.clip_by_global_norm(max_norm), optax.sgd(rate, momentum=0.9)
    )

    def step(carry, rows):
        params, state = carry
        loss, grads = jax.value_and_grad(error)(params, x[rows], y[rows])
        updates, state = optimizer.update(grads, state, params)
        seen = {"loss": loss, "norms": jax.tree.map(jnp.linalg.norm, grads)}
        seen |= oc.summary(state)
        return (optax.apply_updates(params, updates), state), seen

    rng = np.random.default_rng(1)
    rows = jnp.asarray(rng.integers(0, ROWS, size=(steps, BATCH)))
    params = init()
    _, seen = jax.jit(functools.partial(jax.lax.scan, step))(
        (params, optimizer.init(params)), rows
    )
    return columns(jax.device_get(seen))


def columns(seen):
    """Returns the columns of a history, as `optaxclip.history` names them."""
    seen = {k: v if k == "norms" else np.asarray(v, float) for k, v in seen.items()}
    norms, loss = seen["norms"], seen["loss"]
    found = {"step": np.arange(len(loss)), "width": np.ones(len(loss), np.int64)}
    found |= {"loss": loss, "norm": seen["clip/norm"]}
    for name, layer in norms.items():
        found |= {f"norm/{name}/{k}": np.asarray(layer[k], float) for k in layer}
    found |= {k: seen[k] for k in ("clip/norm", "clip/max_norm", "clip/factor")}
    nonfinite = ~np.isfinite(loss) | ~np.isfinite(found["norm"])
    found["clipped"] = (found["clip/factor"] < 1).astype(np.int64)
    found["skipped"] = np.zeros(len(loss), np.int64)
    return found | {"nonfinite": nonfinite.astype(np.int64)}


def good():
    return history(7.0)


def exploding():
    return history(np.inf)


def dead():
    return history(600.0)
