"""The textbooks' regression in Keras, one run, as they have it."""

import importlib
import os
from collections.abc import Mapping

from _regression_data import FEATURES, TRAIN_ROWS, regression_data

os.environ["KERAS_BACKEND"] = "jax"
keras = importlib.import_module("keras")


def train_once(clip: Mapping[str, float], seed: int, epochs: int) -> list[float]:
    """Trains with a clip, an argument of SGD; returns the last MSE of each half."""
    x, y = regression_data()
    train, test = (x[:TRAIN_ROWS], y[:TRAIN_ROWS]), (x[TRAIN_ROWS:], y[TRAIN_ROWS:])
    keras.utils.set_random_seed(seed)
    hidden = keras.layers.Dense(25, "relu", kernel_initializer="he_uniform")
    model = keras.Sequential([keras.Input((FEATURES,)), hidden, keras.layers.Dense(1)])
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9, **clip)
    model.compile(optimizer, "mean_squared_error")
    model.fit(*train, epochs=epochs, validation_data=test, verbose=0)
    return [model.evaluate(*half, verbose=0) for half in (train, test)]
