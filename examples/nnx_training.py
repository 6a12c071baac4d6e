"""The clip in a Flax NNX training loop: a few batches have far too large a gradient.

A small network learns a wave. Of a thousand targets one is missing, and reads -999: the
gradient of its batch is a hundred times as large as the others. `nnx.Optimizer` takes
the clip as a part of the chain, and `summary` reads from the optimizer what the clip
saw at each step. Draws nnx_training.png, and prints the error of the curve (root mean
square; that of a curve that is 0 everywhere is 0.66):

    no clip          error 1.007, clipped 0% of the steps
    global norm 1.0  error 0.060, clipped 27% of the steps
"""

import sys

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import optaxclip

STEPS = 150 if "--quick" in sys.argv else 600
MAX_NORM = 1.0

# Data: one batch of 64 rows for each step, and a grid without noise for the error.
rng = np.random.default_rng(0)
x = rng.uniform(-1, 1, (STEPS, 64, 1)).astype(np.float32)
y = np.sin(4 * x) + 0.1 * rng.normal(size=x.shape).astype(np.float32)
y[rng.random(x.shape) < 0.001] = -999
grid = np.linspace(-1, 1, 201, dtype=np.float32)[:, None]


# Model.
class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden_1 = nnx.Linear(1, 64, rngs=rngs)
        self.hidden_2 = nnx.Linear(64, 64, rngs=rngs)
        self.output = nnx.Linear(64, 1, rngs=rngs)

    def __call__(self, x):
        return self.output(nnx.tanh(self.hidden_2(nnx.tanh(self.hidden_1(x)))))


@nnx.jit
def train_step(model, optimizer, x, y):
    def loss_fn(model):
        return jnp.mean((model(x) - y) ** 2)

    grads = nnx.grad(loss_fn)(model)
    optimizer.update(model, grads)
    return optaxclip.summary(optimizer.opt_state)


def train(name, clip):
    model = Model(nnx.Rngs(0))
    tx = optax.chain(clip, optax.adam(3e-3))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    norms = []
    for i in tqdm(range(STEPS), desc=name, unit="step"):
        stats = train_step(model, optimizer, x[i], y[i])
        norms.append(stats["clip/norm"])
    error = jnp.sqrt(jnp.mean((model(grid) - np.sin(4 * grid)) ** 2))
    share = stats["clip/clipped_fraction"]
    print(f"{name:16} error {error:.3f}, clipped {share:.0%} of the steps")
    return np.array(norms)


train("no clip", optaxclip.clip_by_global_norm(jnp.inf))
norms = train("global norm 1.0", optaxclip.clip_by_global_norm(MAX_NORM))

steps, is_clipped = np.arange(1, STEPS + 1), norms > MAX_NORM
figure, ax = plt.subplots(figsize=(8, 5), layout="constrained")
ax.semilogy(steps[~is_clipped], norms[~is_clipped], "C0.", label="passed as it is")
ax.semilogy(steps[is_clipped], norms[is_clipped], "kx", label="clipped to norm 1")
ax.axhline(MAX_NORM, color="k", linestyle="--", label=f"max_norm = {MAX_NORM:g}")
ax.set(xlabel="step", ylabel="gradient norm before the clip")
ax.set_title("A target of -999 makes a gradient too large by far: it is clipped")
ax.legend()
figure.savefig("nnx_training.png")
