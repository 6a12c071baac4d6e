"""Plants faults in the package, one at a time, and lists those that no test sees.

    python tests/mutate.py [--each 3] [--seed 0] [--own] [_measure/reduce norms ...]

A fault is a comparison, a sign, a constant, a condition or two arguments changed in one
place, chosen by the seed. Each runs with the tests of its module, in a copy; a minute
or two if it survives. What is listed changes nothing, or lacks a test.
"""

import argparse
import ast
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
DEFAULTS = ["tests/docs/test_rules_page.py", "-k", "names_the_defaults"]
ROWS = "first_step or nan_makes or bit_for_bit or eager or statistics"
CONTRACT = ["tests/contract", "-k", f"({ROWS}) and not 16 and not 64 and not 8"]
ONE_DEVICE = ["tests/contract/test_one_device.py"]
LIMIT = 900  # seconds of one of these
# Imported once, for it takes as long as most tests; none of them runs anything.
LIBRARIES = ("pytest", "chex", "flax.linen", "orbax.checkpoint")

# The tests of each module, the quickest first. Of all others it is the contract.
TESTS = {
    "_arguments/checks": (
        "errors errors_of_patterns rules facts_of_rules thresholds deviations "
        "quantiles by_params clippy qk_clip per_example batches_on_meshes "
        "optax_names adapt example_errors"
    ),
    "_arguments/contexts": "mesh_errors stacks_on_meshes",
    "_arguments/mistakes": "mistaken_functions mistaken_numbers",
    "_clips/acclip": "elements",
    "_clips/by_norm": "by_norm drop_ins errors",
    "_clips/by_params": "by_params clippy qk_clip",
    "_clips/by_value": "by_value errors numerics",
    "_clips/clippy": "clippy",
    "_clips/elements": "by_value summary",
    "_clips/known_norm": "by_norm errors outside_of_jit",
    "_clips/learnt_global": "rules facts_of_rules",
    "_clips/learnt_per_leaf": "by_params clippy qk_clip rules facts_of_rules",
    "_clips/qk_clip": "qk_clip",
    "_clips/singular_values": "matrices matrices_on_meshes",
    "_clips/spam": "elements",
    "_clips/spectra": "matrices matrices_on_meshes",
    "_clips/spectral_norm": "matrices matrices_on_meshes",
    "_clips/stable_adamw": "stable_adamw",
    "_clips/stable_spam": "rules facts_of_rules elements",
    "_clips/wrappers": "wrappers",
    "_cotangents/cotangents": "cotangents numerics single_numbers properties",
    "_cotangents/flax_layers": "flax_layers flax_layers_in_use",
    "_cotangents/stats": "cotangents flax_layers flax_layers_in_use",
    "_engine/at_once": "outside_of_jit errors_of_patterns",
    "_engine/clip_by": (
        "by_value by_norm drop_ins errors errors_of_patterns thresholds "
        "deviations quantiles"
    ),
    "_engine/limits": (
        "errors errors_of_patterns thresholds deviations quantiles rules "
        "facts_of_rules by_value by_norm drop_ins"
    ),
    "_engine/multiply": "numerics single_numbers properties by_value by_norm drop_ins",
    "_engine/state": "by_value by_norm drop_ins summary names platforms",
    "_guards/guards": "spikes no_trace culprits faults guard_errors patience",
    "_guards/inputs": "inputs faults",
    "_guards/running_statistics": "around_others",
    "_guards/watched": "patience guards_on_meshes",
    "_guards/outcomes": "outcomes guard_derivatives",
    "_guards/selection": "selection",
    "_guards/skips": "no_trace spikes culprits inputs guards_in_jax faults",
    "_looking/by_name": "names summary",
    "_looking/summary": "summary names errors errors_of_patterns",
    "_measure/formulas": (
        "norms platforms numerics single_numbers properties meshes mesh_errors"
    ),
    "_measure/names": "names culprits",
    "_measure/own_norms": "norms meshes",
    "_measure/reduce": (
        "norms platforms numerics single_numbers properties meshes mesh_errors"
    ),
    "_measure/scopes": "norms numerics single_numbers properties platforms",
    "_measure/stacks": "stacks stacks_on_meshes",
    "_measure/unit_norms": "norms meshes",
    "_measure/units": "platforms by_value by_norm drop_ins",
    "_mesh/collectives": "meshes mesh_errors",
    "_mesh/splits": "meshes mesh_errors",
    "_mesh/summed": "meshes mesh_errors",
    "_per_example/adapt": "adapt",
    "_per_example/centered": "centered",
    "_per_example/examples": (
        "per_example batches_on_meshes optax_names adapt example_errors"
    ),
    "_per_example/grad": (
        "per_example batches_on_meshes optax_names adapt example_errors"
    ),
    "_per_example/optax_names": "optax_names example_errors",
    "_thresholds/averages": (
        "rules facts_of_rules thresholds deviations quantiles product"
    ),
    "_thresholds/deviations": "deviations rules product",
    "_thresholds/moments": (
        "moments rules facts_of_rules thresholds deviations quantiles product"
    ),
    "_thresholds/quantiles": "quantiles rules product",
    "_thresholds/z_score": "rules facts_of_rules product",
    "_trees/infinity": "states thresholds",
    "_trees/leaves": (
        "errors errors_of_patterns norms elements by_params clippy qk_clip "
        "numerics single_numbers properties"
    ),
    "_trees/memories": "elements wrappers",
    "_trees/paths": "paths errors errors_of_patterns",
    "factors": "by_value by_norm drop_ins numerics single_numbers properties",
    "norms": "norms errors errors_of_patterns paths",
    "thresholds": "thresholds deviations quantiles product",
}
SWAPS = {
    **{ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">"},
    **{ast.Eq: "!=", ast.NotEq: "==", ast.In: "not in", ast.NotIn: "in"},
    **{ast.Is: "is not", ast.IsNot: "is", ast.And: "or", ast.Or: "and"},
    **{ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.Pow: "*"},
    **{ast.FloorDiv: "/", ast.Mod: "*", ast.BitAnd: "|", ast.BitOr: "&"},
}
NAMES = {
    **{"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum"},
    **{"any": "all", "all": "any", "psum": "pmax", "pmax": "psum", "sum": "max"},
    **{"argsort": "asarray", "sorted": "list", "floor": "ceil", "expm1": "exp"},
    **{"isfinite": "isinf", "isnan": "isinf", "zeros_like": "ones_like"},
    **{"ones_like": "zeros_like", "exp": "expm1", "square": "abs"},
}


IGNORED = ("strict", "inline", "static", "static_argnums")  # no result hangs on them


class Fault(NamedTuple):
    """Bytes `start` to `end` of a module, replaced."""

    module: str
    start: int
    end: int
    new: bytes

    def planted(self, source: bytes) -> bytes:
        return source[: self.start] + self.new + source[self.end :]

    def __str__(self) -> str:
        source = (ROOT / "optaxclip" / f"{self.module}.py").read_bytes()
        line = source[: self.start].count(b"\n") + 1
        lines = [x.splitlines()[line - 1] for x in (source, self.planted(source))]
        old, new = (x.decode().strip() for x in lines)
        return f"{self.module}.py:{line}\n    - {old}\n    + {new}"


class Places:
    """Where in a source the nodes of its tree are, in bytes."""

    def __init__(self, source: bytes):
        self.source = source
        lengths = [len(line) for line in source.splitlines(keepends=True)]
        self.lines = [sum(lengths[:i]) for i in range(len(lengths) + 1)]

    def of(self, node) -> tuple[int, int]:
        start = self.lines[node.lineno - 1] + node.col_offset
        return start, self.lines[node.end_lineno - 1] + node.end_col_offset

    def text(self, node) -> bytes:
        start, end = self.of(node)
        return self.source[start:end]

    def between(self, left, right, new: str) -> tuple[int, int, bytes]:
        """The operator between two nodes, perhaps with brackets around it."""
        start, end = self.of(left)[1], self.of(right)[0]
        gap = self.source[start:end]
        token = gap.strip(b" ()\n")
        at = start + gap.index(token)
        return at, at + len(token), new.encode()


def code(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes that decide what is computed: no messages, types and decorators."""
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list", "exc", "msg"):
            continue
        for node in value if isinstance(value, list) else [value]:
            if not isinstance(node, ast.AST) or isinstance(node, ast.JoinedStr):
                continue
            if isinstance(node, ast.Import | ast.ImportFrom):
                continue
            if isinstance(node, ast.keyword) and node.arg in IGNORED:
                continue
            yield node
            yield from code(node)


def changes(node: ast.AST, at: Places) -> Iterator[tuple[int, int, bytes]]:
    """What may be wrong about a node: where, and what would be there."""
    match node:
        case ast.Compare(left=left, ops=ops, comparators=others):
            for a, op, b in zip([left, *others], ops, others, strict=False):
                yield at.between(a, b, SWAPS[type(op)])
        case ast.BinOp(left=a, op=op, right=b) if type(op) in SWAPS:
            yield at.between(a, b, SWAPS[type(op)])
        case ast.BoolOp(op=op, values=[a, b, *_]):
            yield at.between(a, b, SWAPS[type(op)])
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=x):
            yield *at.of(node), at.text(x)
        case ast.Constant(value=bool(x)):
            yield *at.of(node), str(not x).encode()
        case ast.Constant(value=int(x) | float(x)):
            other = x + 1 if isinstance(x, int) else 2 * x or 1.0
            yield *at.of(node), str(other).encode()
        case ast.Attribute(attr=name) if name in NAMES:
            end = at.of(node)[1]
            yield end - len(name), end, NAMES[name].encode()
        case ast.Name(id=name) if name in NAMES:
            yield *at.of(node), NAMES[name].encode()
        case ast.If(test=x) | ast.IfExp(test=x) | ast.comprehension(ifs=[x]):
            yield *at.of(x), b"not (" + at.text(x) + b")"
        case ast.Call(func=ast.Attribute(attr="where"), args=[_, a, b]):
            middle = at.source[at.of(a)[1] : at.of(b)[0]]
            yield at.of(a)[0], at.of(b)[1], at.text(b) + middle + at.text(a)


def faults(module: str) -> list[Fault]:
    source = (ROOT / "optaxclip" / f"{module}.py").read_bytes()
    at = Places(source)
    every = [c for node in code(ast.parse(source)) for c in changes(node, at)]
    return [Fault(module, *change) for change in dict.fromkeys(every)]


def run(arguments: list[str], copy: Path, log: Path) -> str:
    """Runs pytest in a child, which has imported JAX already: died, survived, slow."""
    if not (child := os.fork()):
        status = 1
        try:
            os.setsid()
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(out, stream)
            os.chdir(copy)
            sys.path[:0] = [str(copy)]
            options = ["-x", "-q", "-m", "", "-p", "no:cacheprovider", *arguments]
            status = int(importlib.import_module("pytest").main(options))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)  # whatever happens, here is no way out of the `with`
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "survived" if status == 0 else "died"
        time.sleep(0.1)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "slow"


def stages(module: str, own_only: bool) -> list[list[str]]:
    names = TESTS.get(module, "").split()
    own = [str(next(Path("tests").rglob(f"test_{name}.py"))) for name in names]
    doctest = f"optaxclip/{module}.py"
    wide = [] if own_only else [CONTRACT, ONE_DEVICE]
    return [[doctest, *own[:1]], DEFAULTS, *([x] for x in own[1:]), *wide]


def verdict(fault: Fault, stages: list, passed: list, folder: Path) -> str:
    """Runs some stages one after the other until one sees the fault.

    Raises:
      AssertionError: one fails without a fault.
    """
    target = folder / "copy" / "optaxclip" / f"{fault.module}.py"
    source = target.read_bytes()
    log = folder / "log.txt"
    for stage in stages:
        if stage not in passed:
            found = run(stage, folder / "copy", log)
            assert found == "survived", log.read_text()
            passed.append(stage)
        target.write_bytes(fault.planted(source))
        found = run(stage, folder / "copy", log)
        target.write_bytes(source)
        if found != "survived":
            return found
    return "survived"


def prepared(folder: Path) -> None:
    """Copies the package, keeps compiled kernels, imports what all tests need."""
    ignore = shutil.ignore_patterns(".*", "results", "__pycache__")
    shutil.copytree(ROOT, folder / "copy", ignore=ignore)
    os.environ |= {
        "PYTHONPATH": str(folder / "copy"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "kernels"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    sys.dont_write_bytecode = True
    for library in LIBRARIES:
        importlib.import_module(library)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    package = ROOT / "optaxclip"
    every = sorted(
        str(path.relative_to(package).with_suffix(""))
        for path in package.rglob("[!_]*.py")
    )
    parser.add_argument("modules", nargs="*", default=every)
    parser.add_argument("--each", type=int, default=3, help="faults of a module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--own", action="store_true", help="run no contract")
    options = parser.parse_args()
    count = survived = 0
    passed = []  # without a fault
    with tempfile.TemporaryDirectory() as name:
        prepared(folder := Path(name))
        for module in options.modules:
            found = faults(module)
            draw = random.Random(f"{options.seed} {module}")
            for fault in draw.sample(found, min(options.each, len(found))):
                start = time.monotonic()
                some = stages(module, options.own)
                result = verdict(fault, some, passed, folder)
                seconds = time.monotonic() - start
                print(f"{result} after {seconds:.0f} s: {fault}", flush=True)
                count, survived = count + 1, survived + (result == "survived")
    print(f"{count} faults, {survived} survived")


if __name__ == "__main__":
    main()
