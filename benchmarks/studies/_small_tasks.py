"""On which small tasks does a clip matter, or should it do no harm?

Each is learnt in a second or two by SGD with momentum, or by Adam, from a few hundred
small batches. The rows that are held out are clean.
"""

from functools import cache

import _sequence_tasks as sequences
import _vector_tasks as vectors

ALL = (
    vectors.regression,
    vectors.digits,
    vectors.logistic,
    vectors.factorisation,
    sequences.adding,
    sequences.handwriting,
    sequences.characters,
    vectors.scans,
    vectors.zeros,
    vectors.wine,
    vectors.cancer,
    vectors.diabetes,
    vectors.counts,
    vectors.tensor,
    sequences.rows,
    sequences.rows_adam,
    vectors.autoencoder,
    vectors.friedman,
)
TASKS = {task.__name__: cache(task) for task in ALL}
