"""Finds out why the loss is NaN, and which threshold mends it.

A network that predicts unscaled targets explodes within ten steps. `record` is a flight
recorder around the optimizer: the state holds the run, and stops at the crash.
`diagnose` reads it and says what happened; `suggest_max_norm` asks the optimizer for a
threshold before the first step. Then the run is what it should be.

It prints what diagnose says of both runs, and between them the threshold:
    held-out error nan (that of a constant is 26 000)
    exploded: EXPLODED at step 8 (every leaf). The gradient norm grew from 688 to ...
    max_norm = 2.1
    held-out error 4
    always_clipped: CLIPPED AT 100 % of the steps: the threshold 2.14 is below all ...
    healthy: HEALTHY: 1500 steps, all finite. Loss: 1.61e4 at first, 1.4 at the end. ...
Clipped at every step is no fault: the threshold is a part of the learning rate then.
The figure, find_the_explosion.png, shows both runs: left the last steps before the
crash and how fast the norm grew, right what the clip took away. 15 s on two CPU cores.
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

STEPS = 100 if "--quick" in sys.argv else 1500

x, y = make_regression(1000, n_features=20, noise=0.1, random_state=1)
x, x_test, y, y_test = map(np.float32, (x[:500], x[500:], y[:500], y[500:]))

init = nn.initializers.he_uniform()
model = nn.Sequential([nn.Dense(25, kernel_init=init), nn.relu, nn.Dense(1)])
params = model.init(jax.random.key(0), x[:1])


@jax.jit
def error_fn(params, x, y):
    return jnp.mean((model.apply(params, x)[:, 0] - y) ** 2)


def train(params, optimizer):
    optimizer = optaxclip.record(optimizer)  # this line
    opt_state = optimizer.init(params)

    @jax.jit
    def train_step(params, opt_state, x, y):
        loss, grads = jax.value_and_grad(error_fn)(params, x, y)
        updates, opt_state = optimizer.update(grads, opt_state, params, value=loss)
        return optax.apply_updates(params, updates), opt_state

    rng = np.random.default_rng(0)
    for _ in tqdm(range(STEPS)):
        rows = rng.integers(500, size=32)
        params, opt_state = train_step(params, opt_state, x[rows], y[rows])
    print(f"held-out error {error_fn(params, x_test, y_test):.2g}")
    return optaxclip.history(opt_state, params)


sgd = optax.sgd(0.01, momentum=0.9)
lost = train(params, sgd)
for name, sentence in optaxclip.diagnose(lost).items():
    print(f"{name}: {sentence}")

max_norm = optaxclip.suggest_max_norm(sgd, params)
print(f"max_norm = {max_norm:.2g}")

mended = train(params, optax.chain(optaxclip.clip_by_global_norm(max_norm), sgd))
for name, sentence in optaxclip.diagnose(mended).items():
    print(f"{name}: {sentence}")

figure, axes = plt.subplots(2, 2, figsize=(11, 6), layout="constrained")
optaxclip.plot.run(lost, axes[:, 0])
optaxclip.plot.run(mended, axes[:, 1])
figure.savefig("find_the_explosion.png", dpi=120)
