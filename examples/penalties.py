"""L1 and L2 penalties do not prevent an exploding loss. A clip does.

Often advised against exploding gradients, they pull the weights towards zero, but a
step that is too large stays too large: with unscaled targets all is lost within ten.

It prints the mean squared error on held-out rows (that of a constant is 26 000):
    no clip                 nan
    no clip, L1 penalty     nan
    no clip, L2 penalty     nan
    clip                    15
So end all coefficients from 0.01 to 1000. With the clip, those up to 0.1 change little
(12 to 29, without 15 and 21, from two seeds), and those from 100 on leave hardly
anything learned. The LSTM of handwriting_lstm.py is lost with either of 1e-4 to 1, too
(beside its loss per move), on the recurrent weights or on all.
The figure, penalties.png, shows the four runs. 5 s on two CPU cores.
"""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import make_regression
from tqdm import tqdm

import optaxclip

STEPS = 60 if "--quick" in sys.argv else 400

x, y = make_regression(1000, n_features=20, noise=0.1, random_state=1)
x, x_test, y, y_test = map(np.float32, (x[:500], x[500:], y[:500], y[500:]))

init = nn.initializers.he_uniform()
model = nn.Sequential([nn.Dense(25, kernel_init=init), nn.relu, nn.Dense(1)])


@jax.jit
def error_fn(params, x, y):
    return jnp.mean((model.apply(params, x)[:, 0] - y) ** 2)


def train(name, line, width, max_norm, l1=0.0, l2=0.0):
    clip = optaxclip.clip_by_global_norm(max_norm)
    optimizer = optax.chain(clip, optax.sgd(0.01, momentum=0.9))
    params = model.init(jax.random.key(0), x[:1])
    opt_state = optimizer.init(params)

    def loss_fn(params, x, y):
        kernels = [w for w in jax.tree.leaves(params) if w.ndim == 2]  # no biases
        penalties = [l1 * jnp.abs(w).sum() + l2 * (w**2).sum() for w in kernels]
        return error_fn(params, x, y) + sum(penalties)

    @jax.jit
    def train_step(params, opt_state, x, y):
        grads = jax.grad(loss_fn)(params, x, y)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    rng, errors = np.random.default_rng(0), []
    for _ in tqdm(range(STEPS), desc=name):
        rows = rng.integers(500, size=32)
        params, opt_state = train_step(params, opt_state, x[rows], y[rows])
        errors.append(float(error_fn(params, x_test, y_test)))
    print(f"{name:23} {errors[-1]:.0f}")
    plt.loglog(np.arange(1, STEPS + 1), errors, line, linewidth=width, label=name)


plt.figure(figsize=(8, 4.5), layout="constrained")
train("no clip", "0.8", 8, np.inf)
train("no clip, L1 penalty", "C1", 4, np.inf, l1=1.0)
train("no clip, L2 penalty", "k:", 1.5, np.inf, l2=1.0)
train("clip", "C0", 2, 10.0)
plt.title("Penalties do not prevent the explosion, a clip does")
plt.xlabel("step (log scale); where a line ends, the loss is NaN")
plt.ylabel("squared error on held-out rows (log scale)")
plt.legend()
plt.savefig("penalties.png", dpi=120)
