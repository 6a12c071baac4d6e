"""Fits targets of -400 to 400: NaN without a clip, which is one line in the optimizer.

    no clip      train nan    test nan
    clipnorm 1   train 1.8    test 9.8
    clipvalue 5  train 40     test 45
Median errors of the last 10 epochs. "Or": tried without a clip, test error (5 seeds).
"""

import flax.linen as nn
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import make_regression
from tqdm import tqdm

import optaxclip

x, y = make_regression(1000, 20, noise=0.1, random_state=1)  # Or y / y.std(): 30-240
figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
axes[0, 0].hist(y, bins=20)
axes[0, 1].boxplot(y)
he = nn.initializers.he_uniform()  # Or no hidden layer, as the data are linear: 0.01
model = nn.Sequential([nn.Dense(25, kernel_init=he), nn.relu, nn.Dense(1)])
mse = jax.jit(lambda params, x, y: ((model.apply(params, x)[:, 0] - y) ** 2).mean())


def fit(name, clip, color):
    measure, sgd = optaxclip.clip_by_global_norm(np.inf), optax.sgd(0.01, momentum=0.9)
    optimizer = optax.chain(measure, clip, sgd)  # Or a rate of 0.001: 2-10; 0.002: NaN

    @jax.jit
    def step(params, opt_state, x, y):  # Or optax.huber_loss: 9-21; L1, L2 added: NaN
        updates, opt_state = optimizer.update(jax.grad(mse)(params, x, y), opt_state)
        return optax.apply_updates(params, updates), opt_state

    params, rng = model.init(jax.random.key(0), x), np.random.default_rng(0)
    opt_state, norms, errors = optimizer.init(params), [], []
    for _ in tqdm(range(100), name):
        for rows in rng.permutation(500)[:480].reshape(15, 32):  # Or batches of 8: NaN
            params, opt_state = step(params, opt_state, x[rows], y[rows])
            norms.append(optaxclip.summary(opt_state)["clip_0/norm"])
        errors.append([mse(params, x[:500], y[:500]), mse(params, x[500:], y[500:])])
    print("{:12} train {:<6.2g} test {:.2g}".format(name, *np.median(errors[-10:], 0)))
    axes[1, 0].semilogy(errors, color=color, label=[f"{name}, train", f"{name}, test"])
    axes[1, 1].loglog(range(1, 1501), norms, color)


axes[1, 0].set_prop_cycle(linestyle=["-", "--"])
fit("no clip", optaxclip.clip_by_global_norm(np.inf), "k")  # only measures
fit("clipnorm 1", optaxclip.clip_by_global_norm(1.0), "C0")
fit("clipvalue 5", optaxclip.clip_by_value(5.0), "C1")
axes[1, 1].axhline(1.0, color="C0", linestyle=":", label="the threshold of clipnorm 1")
axes[0, 0].set(xlabel="target", ylabel="rows")
axes[0, 1].set(ylabel="target", xticks=[])
axes[1, 0].set(xlabel="epoch", ylabel="mean squared error (NaN without a clip)")
axes[1, 1].set(xlabel="step", ylabel="gradient norm before the clip")
figure.legend(loc="outside lower center", ncols=4)
figure.suptitle("Without a clip all is NaN after eight steps; with one the error falls")
figure.savefig("mlp_regression.png")
