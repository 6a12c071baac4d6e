"""The textbooks' regression on unscaled targets: the data, for any library."""

from typing import NamedTuple

import numpy as np
from sklearn.datasets import make_regression

TRAIN_ROWS = 500  # and as many for testing
FEATURES = 20


class Data(NamedTuple):
    """The rows for training, then as many for testing."""

    x: np.ndarray  # [1000, 20]
    y: np.ndarray  # [1000], the targets


def regression_data() -> Data:
    """Makes the textbooks' data set."""
    x, y = make_regression(2 * TRAIN_ROWS, FEATURES, noise=0.1, random_state=1)[:2]
    return Data(np.asarray(x, np.float32), np.asarray(y, np.float32))
