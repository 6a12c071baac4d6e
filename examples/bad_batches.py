"""Guards skip the steps that must not happen: batches with NaN, or far out of scale.

A small network learns digits. Some batches have a pixel that is NaN, others were
multiplied by 1000. Without a guard the first NaN is the end. `skip_if_nonfinite` skips
what is not finite, `skip_if_spike` what is far above the norms so far; a skipped step
leaves parameters and momentum as they were. Draws bad_batches.png, and prints:

    no guard           test loss nan, accuracy 10%
    skip_if_nonfinite  test loss 2.31, accuracy 10%
    and skip_if_spike  test loss 0.31, accuracy 93%
    Of 8 batches with a NaN 8 were skipped, the last by params/layers_0/kernel.
    Of 6 batches times 1000 4 were skipped.

Two of those passed, for their gradients were of the usual size: the loss shows no harm.
"""

import sys

import flax.linen as nn
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from tqdm import tqdm

import optaxclip

STEPS = 200 if "--quick" in sys.argv else 600

# Data: 64 images for each step. Some are spoilt, but not the first batches, for
# `skip_if_spike` looks at 64 steps before it acts.
x, y = load_digits(return_X_y=True)
x, x_test = np.split((x / 16).astype(np.float32), [1297])
y, y_test = np.split(y, [1297])
rng = np.random.default_rng(0)
rows = rng.integers(1297, size=(STEPS, 64))
kinds = rng.choice(["good", "NaN", "x 1000"], size=STEPS, p=[0.96, 0.02, 0.02])
kinds[:100] = "good"


def load_batch(step):
    images, labels = x[rows[step]], y[rows[step]]
    if kinds[step] == "NaN":
        images[0, 20] = np.nan
    if kinds[step] == "x 1000":
        images *= 1000
    return images, labels


# Model.
hidden = nn.Dense(32, kernel_init=nn.initializers.he_uniform())
model = nn.Sequential([hidden, nn.relu, nn.Dense(10)])


@jax.jit
def loss_fn(params, x, y):
    logits = model.apply(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


# Optimizer: a guard goes around all of it, and one guard around another.
sgd = optax.sgd(0.1, momentum=0.9)
guarded = optaxclip.skip_if_nonfinite(sgd)
guarded_twice = optaxclip.skip_if_nonfinite(optaxclip.skip_if_spike(sgd))


def train(name, optimizer):
    @jax.jit
    def train_step(params, opt_state, x, y):
        grads = jax.grad(loss_fn)(params, x, y)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = model.init(jax.random.key(0), x[:1])
    opt_state, losses = optimizer.init(params), []
    for step in tqdm(range(STEPS), desc=name, unit="step"):
        params, opt_state = train_step(params, opt_state, *load_batch(step))
        losses.append(loss_fn(params, x_test, y_test))
    right = model.apply(params, x_test).argmax(axis=-1) == y_test
    print(f"{name}  test loss {losses[-1]:.2f}, accuracy {right.mean():.0%}")
    return losses, params, opt_state


without, *_ = train("no guard         ", sgd)
with_one, *_ = train("skip_if_nonfinite", guarded)
with_both, params, opt_state = train("and skip_if_spike", guarded_twice)

stats = optaxclip.summary(opt_state, params)
(culprit,) = [name for name in stats if name.startswith("guard_0/culprit/")]
nan_steps, large_steps = (np.flatnonzero(kinds == kind) for kind in ("NaN", "x 1000"))
print(
    f"Of {len(nan_steps)} batches with a NaN {stats['guard_0/skipped_count']} were"
    f" skipped, the last by {culprit[16:]}."
)
print(
    f"Of {len(large_steps)} batches times 1000 {stats['guard_1/skipped_count']} were"
    " skipped."
)

figure, ax = plt.subplots(figsize=(8, 5), layout="constrained")
ax.semilogy(without, "k:", linewidth=3, zorder=3, label="no guard: NaN where it ends")
ax.semilogy(with_one, "C1--", label="skip_if_nonfinite alone")
ax.semilogy(with_both, "C0", label="skip_if_nonfinite and skip_if_spike")
ax.plot(nan_steps, np.full(len(nan_steps), 0.2), "kx", label="batch with a NaN")
ax.plot(large_steps, np.full(len(large_steps), 0.2), "k^", label="batch times 1000")
ax.set(xlabel="step", ylabel="cross-entropy of good test images (nats)")
ax.set_title(
    "One bad batch ends the training; with guards it is skipped, and all is well"
)
ax.legend()
figure.savefig("bad_batches.png")
