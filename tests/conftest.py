"""What every test needs: eight virtual devices, strict shapes, and one precision."""

import gc
import importlib
import itertools
import os
import pathlib
import platform

import chex
import hypothesis
import jax
import jax.numpy as jnp
import pytest

import helpers

# Kernels that run once are not worth the time it takes to make them fast. XLA's passes
# stay, so the same operations are done in the same fusions; only its code generator is
# the older one, and LLVM does not optimize. What a user runs is tested in the modules
# where digits are the question, and everywhere with this variable set to 0.
VARIABLE = "JAX_DISABLE_MOST_OPTIMIZATIONS"
QUICK = os.environ.setdefault(VARIABLE, "1") != "0"  # set: processes started here, too
jax.config.update(VARIABLE.lower(), QUICK)
DIGITS = (
    *("adapt", "batches_on_meshes", "optax_names", "per_example"),
    *("flax_layers", "flax_layers_in_use"),
    *("norms", "numerics", "platforms", "properties", "single_numbers"),
)

# On one device small leaves are joined: `test_one_device.py` starts a process with one.
DEVICES = os.environ.get("OPTAXCLIP_DEVICES", "8")

# XLA reads its flags with the first array, and stops at any that it does not know.
FLAGS = [f"--xla_force_host_platform_device_count={DEVICES}"]
if QUICK and jax.__version_info__ < (0, 11) and platform.machine() == "x86_64":
    # Without a fused multiply-add two programs round the same sum alike.
    FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_max_isa=AVX"]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])

hypothesis.settings.register_profile("local", deadline=None, max_examples=25)
hypothesis.settings.register_profile(
    "ci", deadline=None, max_examples=25, derandomize=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def is_whole_run(path):
    """Whether the tests share a run, which takes as long as a hundred other tests.

    The first tests go to one worker in one piece, so that it runs once.
    """
    return path.parent.name == "studies" or path.stem == "test_processes"


def pytest_collection_modifyitems(items):
    """Tests of one clip and dtype follow each other: they share compiled steps."""
    modules = list(dict.fromkeys(item.path for item in items))
    modules.sort(key=lambda path: not is_whole_run(path))

    def order(item):
        params = getattr(item, "callspec", None)
        if not item.path.name.startswith("test_contract") or params is None:
            return (modules.index(item.path), "", "")
        found = params.params
        return (
            modules.index(item.path),
            found.get("name", ""),
            str(found.get("dtype", "")),
        )

    items.sort(key=order)


def pytest_collection_finish():
    """Garbage is looked for less often, and not among what the imports made."""
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


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
def kernels_of_users(request):
    """Compiles as a user does, where digits are the question."""
    in_full = request.path.stem.removeprefix("test_") in DIGITS
    jax.config.update(VARIABLE.lower(), QUICK and not in_full)
    yield
    jax.config.update(VARIABLE.lower(), QUICK)


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


@pytest.fixture(scope="session")
def script():
    """Imports a benchmark, or what they share, from its folder, as running it does."""
    folder = pathlib.Path(__file__).parents[1] / "benchmarks"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield importlib.import_module
