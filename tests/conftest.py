"""What every test needs: eight virtual devices, strict shapes, and one precision.

The devices must be asked for before JAX starts, so this stands above every import
of it.
"""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import chex
import hypothesis
import jax
import jax.numpy as jnp
import pytest

import helpers

hypothesis.settings.register_profile("local", deadline=None, max_examples=25)
hypothesis.settings.register_profile(
    "ci", deadline=None, max_examples=25, derandomize=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


# Their tests share a run of an example, which takes as long as a hundred other tests.
# The first tests go to one worker in one piece, so that it runs once.
WHOLE_RUNS = (
    "char_lstm",
    "image_classifier",
    "lstm_handwriting",
    "rules_compared",
    "sharded_transformer",
    "survive",
)


def pytest_collection_modifyitems(items):
    """Tests of one clip and dtype follow each other: they share compiled steps."""
    modules = list(dict.fromkeys(item.path for item in items))
    modules.sort(key=lambda path: not any(name in path.name for name in WHOLE_RUNS))

    def order(item):
        params = getattr(item, "callspec", None)
        if item.path.name != "test_contract.py" or params is None:
            return (modules.index(item.path), "", "")
        found = params.params
        return (
            modules.index(item.path),
            found.get("name", ""),
            str(found.get("dtype", "")),
        )

    items.sort(key=order)


@pytest.fixture(autouse=True)
def fresh_trace_counts():
    """Chex counts by the name of a function, and every clip's is `update_fn`."""
    chex.clear_trace_counter()


@pytest.fixture(scope="module")
def strict_shapes():
    """No silent broadcast between ranks in our own modules."""
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=helpers.DTYPES)
def dtype(request):
    """Every dtype of the contract; 64 bits are switched on only where needed."""
    with jax.enable_x64(request.param == "float64"):
        yield jnp.dtype(request.param)
