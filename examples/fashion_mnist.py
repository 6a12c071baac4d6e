"""A classifier whose loss explodes, and which then only guesses; with a clip it learns.

Two hidden layers and SGD with momentum, on scikit-learn's digits, or on Fashion-MNIST
if `DATA` says so. At this learning rate a few steps throw the weights so far that the
loss never again is below that of a guess, log(10) = 2.30. Draws fashion_mnist.png, and
prints, on the digits:

    no clip          largest loss of a batch 3e+12, test accuracy 10%
    global norm 0.1  largest loss of a batch 3, test accuracy 93%

A learning rate of 0.1 needs no clip here: 95 % without.
"""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import fetch_openml, load_digits
from tqdm import tqdm

import optaxclip

DATA = "digits"  # or "fashion"
EPOCHS = 3 if "--quick" in sys.argv else 20
LEARNING_RATE = 1.0

# Data: rows of pixels between 0 and 1, and which of ten classes they show.
if DATA == "fashion":  # downloaded once; the last 10 000 are for testing
    x, y = fetch_openml(
        "Fashion-MNIST", version=1, return_X_y=True, as_frame=False, parser="liac-arff"
    )
    x, train_rows = x / 255, 60_000
else:
    x, y = load_digits(return_X_y=True)
    x, train_rows = x / 16, 1297
x, x_test = np.split(x.astype(np.float32), [train_rows])
y, y_test = np.split(y.astype(np.int32), [train_rows])

# Model.
he = nn.initializers.he_uniform()
hidden_1, hidden_2 = nn.Dense(128, kernel_init=he), nn.Dense(128, kernel_init=he)
model = nn.Sequential([hidden_1, nn.relu, hidden_2, nn.relu, nn.Dense(10)])


def loss_fn(params, x, y):
    logits = model.apply(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def train(name, clip):
    # Optimizer: the clip comes first, so that the momentum is one of clipped gradients.
    optimizer = optax.chain(clip, optax.sgd(LEARNING_RATE, momentum=0.9))

    @jax.jit
    def step(params, opt_state, x, y):
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    params = model.init(jax.random.key(0), x[:1])
    opt_state = optimizer.init(params)
    rng, losses = np.random.default_rng(0), []
    for _ in tqdm(range(EPOCHS), desc=name, unit="epoch"):
        order = rng.permutation(train_rows)[: train_rows // 32 * 32]
        for rows in order.reshape(-1, 32):
            params, opt_state, loss = step(params, opt_state, x[rows], y[rows])
            losses.append(loss)
    right = model.apply(params, x_test).argmax(axis=-1) == y_test
    print(
        f"{name:16} largest loss of a batch {max(losses):.0g},"
        f" test accuracy {right.mean():.0%}"
    )
    return range(1, len(losses) + 1), losses


steps, without = train("no clip", optaxclip.clip_by_global_norm(jnp.inf))
steps, clipped = train("global norm 0.1", optaxclip.clip_by_global_norm(0.1))

figure, ax = plt.subplots(figsize=(8, 5), layout="constrained")
ax.loglog(steps, without, "C1", linewidth=2, label="no clip")
ax.loglog(steps, clipped, "C0", label="clip_by_global_norm(0.1)")
ax.axhline(np.log(10), color="k", linestyle=":", label="a guess: log(10)")
ax.set(xlabel="step", ylabel="cross-entropy of the batch (nats)")
ax.set_title(
    "Without a clip the loss explodes, then stays at a guess; with one it falls"
)
ax.legend()
figure.savefig("fashion_mnist.png")
