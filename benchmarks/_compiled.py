"""Compiles for machines that are not there, and reads what comes out.

The compilers for TPU and GPU work on a CPU. Each is in packages of its own, which go
into an environment of their own. Their figures have no noise.
"""

import importlib.metadata
import math
import os
import re
import unittest.mock
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

Figures = dict[str, Any]

OTHERS = ("all_gather", "reduce_scatter", "all_to_all", "collective_permute")
COLLECTIVES = ("all_reduce", *OTHERS)
# Not work of a GPU, of what its program consists of.
NO_KERNELS = {"parameter", "constant", "tuple", "get_tuple_element", "bitcast"}
NO_KERNELS |= {"partition_id", *COLLECTIVES}

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
    "--no-deps jax-cuda13-plugin=={jax} jax-cuda13-pjrt=={jax}",
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


def compile_for(
    target: Target, lower: Callable[[], jax.stages.Lowered]
) -> jax.stages.Compiled:
    """Traces, lowers and compiles from nothing, as on the target."""
    jax.clear_caches()
    # The library asks where it is, and here the answer would always be a CPU.
    with unittest.mock.patch.object(jax, "default_backend", lambda: target.backend):
        lowered = lower()
    return lowered.compile()


class Instruction(NamedTuple):
    """One line of a compiled program.

    Attributes:
      kind: its opcode, such as `all_reduce`; of those in two halves it is the first.
      bytes: of its operands.
      cycles: that the TPU's compiler expects it to take.
      in_entry: whether it is a step of the program, not a part of one.
      in_branch: whether it is in a branch, which may not be taken.
    """

    kind: str
    bytes: int
    cycles: int
    in_entry: bool
    in_branch: bool


HEAD = re.compile(r"(ENTRY )?%?([\w.-]+) .*\{")
LINE = re.compile(r" +(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*?)\)(.*)")
NAME = re.compile(r"%([\w.-]+)")
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


def read(text: str) -> list[Instruction]:
    """Returns what a compiled program consists of."""
    where = entry = ""
    lines: list[tuple[str, str, list[str], str]] = []
    sizes: dict[tuple[str, str], int] = {}
    calls: dict[str, set[str]] = {}
    branches: set[str] = set()
    for line in text.splitlines():
        if head := HEAD.fullmatch(line):
            where = head[2]
            entry = where if head[1] else entry
        elif found := LINE.fullmatch(line):
            name, shape, kind, operands, attributes = found.groups()
            sizes[where, name] = size_of(shape)
            called = set(NAME.findall(attributes))
            calls.setdefault(where, set()).update(called)
            branches |= called if kind == "conditional" else set()
            lines.append((where, kind, NAME.findall(operands), attributes))
    while deeper := {x for b in branches for x in calls.get(b, ())} - branches:
        branches |= deeper
    return [
        Instruction(
            kind.removesuffix("-start").replace("-", "_"),
            sum(sizes.get((where, name), 0) for name in operands),
            sum(map(int, CYCLES.findall(attributes))),
            where == entry,
            where in branches,
        )
        for where, kind, operands, attributes in lines
        if not kind.endswith("-done")
    ]


def size_of(shape: str) -> int:
    """Returns the bytes of a type, such as `(f32[8,128]{1,0:T(8,128)}, pred[])`."""
    total = 0
    for dtype, dimensions in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", shape):
        bits = re.search(r"\d+", dtype)
        sizes = [int(size) for size in dimensions.split(",") if size]
        total += math.prod(sizes) * (int(bits[0]) // 8 if bits else 1)
    return total


def cost(target: Target, compiled: jax.stages.Compiled) -> Figures:
    """Returns the figures of one compiled step, None where its compiler gives none.

    The compiler's time counts copies that overlap with work, the cycles are those of
    kernels alone; neither counts the way between devices. Bytes accessed are a rough
    figure, too: copies count twice, and branches as if all of them were taken.
    """
    program = read(compiled.as_text() or "")
    entry = [x for x in program if x.in_entry]
    collectives = [x for x in program if x.kind in COLLECTIVES]
    always = [x for x in collectives if not x.in_branch]
    rare = [x for x in collectives if x.in_branch]
    own: Any = compiled.cost_analysis() or {}
    # Each view joined of parts counts as -1 s, and in float32 some us get lost in that.
    seconds = own.get("optimal_seconds", -math.inf)
    seconds += sum(x.kind == "custom_call" for x in entry)
    return {
        **{kind: sum(x.kind == kind for x in always) for kind in COLLECTIVES},
        "in_branches": len(rare),
        "others_in_branches": sum(x.kind in OTHERS for x in rare),
        "collective_bytes": sum(x.bytes for x in always),
        "estimate_us": round(1e6 * seconds) if 0 < seconds < 1 else None,
        "cycles": sum(x.cycles for x in entry) or None,
        "bytes_accessed": own.get("bytes accessed"),
        "kernels": sum(x.kind not in NO_KERNELS for x in entry)
        if target.backend == "gpu"
        else None,
    }
