"""What every test needs: eight virtual devices, strict shapes, and one precision.

The devices must be asked for before JAX starts, so this stands above every import
of it.
"""

import itertools
import os
import pathlib

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
    "processes",
    "rules_compared",
    "sharded_transformer",
    "survive",
)


FLAG = "JAX_DISABLE_MOST_OPTIMIZATIONS"
CHOSEN = FLAG in os.environ

# Where digits are the question, kernels are those that a user runs.
OPTIMIZED = (
    "test_layers.py",
    "test_norms.py",
    "test_numerics.py",
    "test_per_example.py",
    "test_platforms.py",
)


def pytest_collection_modifyitems(items):
    """Tests of one clip and dtype follow each other: they share compiled steps.

    Those of optimized kernels come early, as long as there is little to forget.
    """
    modules = list(dict.fromkeys(item.path for item in items))

    def turn(path):
        if any(name in path.name for name in WHOLE_RUNS):
            return 0
        return 1 if path.name in OPTIMIZED else 2

    modules.sort(key=turn)

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


@pytest.fixture(scope="session")
def kinds_compiled():
    """Whether the kernels in JAX's caches were made by the quick compiler."""
    return set()


@pytest.fixture(autouse=True, scope="module")
def quick_compiler(request, kinds_compiled):
    """Kernels that run once are not worth the time that LLVM takes to optimize them.

    XLA's own passes stay, so the same operations are done in the same fusions and only
    the machine code is slower, here and in processes that are started here. A variable
    of the environment goes first: `.ci/run` tests the oldest versions with all
    optimizations.
    """
    before = jax.config.read(FLAG.lower())
    quick = before if CHOSEN else request.path.name not in OPTIMIZED
    if kinds_compiled - {quick}:
        jax.clear_caches()  # its keys do not tell the kinds apart
        kinds_compiled.clear()
    kinds_compiled.add(quick)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FLAG, str(int(quick)))
        jax.config.update(FLAG.lower(), quick)
        yield
    jax.config.update(FLAG.lower(), before)


TESTS_RUN = itertools.count(1)


@pytest.fixture(autouse=True)
def room_for_kernels():
    """Forgets compiled kernels before there are more than a process may have.

    Each takes some of the 65 530 pieces of memory that Linux lets a process map; one
    more, and the compiler ends in a segmentation fault.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if next(TESTS_RUN) % 100 == 0 and maps.exists():
        if maps.read_bytes().count(b"\n") > 40_000:
            jax.clear_caches()


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
