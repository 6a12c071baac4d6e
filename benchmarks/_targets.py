"""For which machines do the benchmarks compile, without having them?

The compilers for TPU and GPU work on a CPU. Each is in packages of its own, which go
into an environment of their own. Their figures have no noise.
"""

import argparse
import importlib.metadata
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

import _results

Row = dict[str, Any]

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 62914560
  clock_rate_ghz: 1.98 device_memory_size: 150000000000
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 patch: 0 }
device_description_str: "NVIDIA H200"
"""


def tpu(name: str) -> list[Any]:
    return topologies.get_topology_desc(name, "tpu").devices


def h200(shape: str) -> list[Any]:
    topology: Any = {"topology": shape, "target_config": H200}
    return topologies.get_topology_desc("", "cuda", **topology).devices


class Target(NamedTuple):
    """A machine to compile for.

    Attributes:
      device: what it has several of.
      backend: what `jax.default_backend()` says there.
      mesh: devices along fsdp and tensor.
      devices: function that returns them.
      compiler: package that the compiler is in.
      install: what to tell pip, beside the JAX there is, to get it.
    """

    device: str
    backend: str
    mesh: tuple[int, int]
    devices: Callable[[], list[Any]]
    compiler: str
    install: str

    def version(self) -> str | None:
        """Returns the compiler's version, None if it is not installed."""
        try:
            return importlib.metadata.version(self.compiler)
        except importlib.metadata.PackageNotFoundError:
            return None


V5E, LIBTPU = ("TPU v5e", "tpu"), ("libtpu", "'jax[tpu]=={jax}'")
CUDA = (
    "jax-cuda13-pjrt",
    "--no-deps jax-cuda13-pjrt=={jax}",
)
TARGETS = {
    "tpu-8": Target(*V5E, (4, 2), lambda: tpu("v5e:2x4"), *LIBTPU),
    "tpu-256": Target(*V5E, (64, 4), lambda: tpu("v5e:16x16"), *LIBTPU),
    "h200-8": Target("NVIDIA H200", "gpu", (4, 2), lambda: h200("1x1x8"), *CUDA),
    "cpu-8": Target("CPU", "cpu", (4, 2), jax.devices, "jaxlib", "jaxlib=={jax}"),
}


def installed(names: Iterable[str]) -> list[str]:
    """Returns those targets that can be compiled for, and says what the others need."""
    found = []
    for name in names:
        target = TARGETS[name]
        if target.version():
            found.append(name)
            continue
        install = target.install.format(jax=jax.__version__)
        print(f"{name} is left out: it needs {target.compiler}. To get it,")
        print(f"in an environment of its own:  pip install {install}")
    return found


def parse(
    parser: argparse.ArgumentParser, names: Iterable[str] = TARGETS
) -> argparse.Namespace:
    """Parses the command line of a benchmark that compiles for targets."""
    parser.add_argument(
        "--platforms", nargs="+", choices=names, help="default: those installed"
    )
    args = _results.parse(parser)
    args.platforms = installed(args.platforms or names)
    if not args.platforms:
        parser.error("no compiler for any of these platforms")
    return args


def set_up(devices: int) -> None:
    """Makes ready to compile; to be called before JAX looks for devices.

    Args:
      devices: whether one or several, as where the program would run: one device joins
        small leaves.
    """
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    # A cache on disk would make the second compilation look free.
    jax.config.update("jax_enable_compilation_cache", False)
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # or the compiler looks for a TPU
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # several may compile at a time


def compile_for(
    target: Target, lower: Callable[[], jax.stages.Lowered]
) -> jax.stages.Compiled:
    """Traces, lowers and compiles from nothing, as on the target."""
    jax.clear_caches()
    return lower().compile()


def describe(question: str, name: str) -> Row:
    """Returns what all rows of a question and a target have in common.

    The device is the one that the figures are of, not the one that compiles; for the
    CPU these are one.
    """
    target, host = TARGETS[name], _results.machine()
    own = {"device": target.device, "platform": target.backend}
    compiled = {
        "compiled_on": host["device"],
        "question": question,
        "target": name,
        "compiler": f"{target.compiler} {target.version()}",
    }
    return host | (own if target.backend != "cpu" else {}) | compiled


def show(form: str, *cells: Any) -> None:
    """Prints a line of a table, with a dash for what a compiler does not say."""
    print(form.format(*("-" if x is None else x for x in cells)), flush=True)
