"""Trains a transformer on a mesh of devices, where a clip must know the whole norm.

A clip needs the norm of the whole gradient, and a device of a mesh has but a piece of
it. The same small model starts from the same bits and reads the same batches in four
settings, on a mesh with the axes data, fsdp and tensor:

    one device     nothing is sharded: what the others must agree with
    jit            parameters split over fsdp and tensor, batches over data and fsdp, by
                   `NamedSharding` alone: the compiler adds the collectives
    shard_map      the collectives written by hand, the optimizer and its clip inside
    local norms    as shard_map, but with `optax.clip_by_global_norm`, which there takes
                   the norm of a device's own pieces for that of the gradient

Run:
    python benchmarks/studies/sharded_transformer.py                # 30 s on two cores
    python benchmarks/studies/sharded_transformer.py --quick  # 20 s, mostly compiling
    python benchmarks/studies/sharded_transformer.py --processes 2  # 1 min: its mesh
        over two processes, which talk to each other as two machines would

Expected (largest relative deviation from one device in any of 80 steps):
                loss at the end    of loss     of norm    of factor   copies differ by
    jit                   2.52       4e-6       3e-4         3e-4           0
    shard_map             2.52       4e-6       2e-4         2e-4           0
    local norms           2.64        0.2        3.6          3.9          0.7
The first three agree to 1e-6 in the first steps; then SGD amplifies what rounding does.
So another machine, or a second process, has other digits of that size. With local norms
no two devices of a replica clip alike: what they hold in common, and should be equal on
all of them, drifts apart, silently.

Without a pair of accelerators the mesh is 8 virtual devices of the CPU, 2 x 2 x 2. With
several they are used, up to 8. `--processes` always takes the CPU.
One figure is written: loss, norm before the clip, and how far the norm is off.
"""

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P, SingleDeviceSharding
from tqdm import tqdm

import optaxclip

DEVICES = 8  # at most; virtual ones, of the CPU, where there is no pair of accelerators
AXES = ("data", "fsdp", "tensor")
MESHES = {8: (2, 2, 2), 4: (1, 2, 2), 2: (1, 2, 1), 1: (1, 1, 1)}  # by their number
READERS = ("data", "fsdp")  # the axes over which a batch is split
TEXT_LENGTH = 100_000  # characters of the standard library's sources
CHARACTERS = 128  # of ASCII
WIDTH = 32
LAYERS = 2
HEADS = 4  # of 8 units
HIDDEN = 128  # units between the two layers of a feed-forward network
CONTEXT = 32  # characters that are read
BATCH_SIZE = 64
LEARNING_RATE = 0.7
MOMENTUM = 0.9
MAX_NORM = 0.3
TIMEOUT = 600  # seconds, for several processes
LAST = 10  # steps over which the final loss is averaged
STYLES = (  # of the settings: color, width and style of the line
    ("0.8", 7, "-"),
    ("C0", 3, "-"),
    ("C1", 1.5, "--"),
    ("C3", 1, "-"),
)


class Record(NamedTuple):
    """What one step measured; or all steps, along a first axis."""

    loss: Any  # nats per character, before the update
    norm: Any  # of the gradient before the clip; one per device where it is local
    factor: Any  # of the clip


class Setting(NamedTuple):
    """One way to spread the training over devices."""

    optimizer: optax.GradientTransformation
    state: Any  # shardings of the parameters and of the optimizer's state
    batch: jax.sharding.Sharding
    step: Callable[..., Any]  # (state, batch) -> (state, Record)


def sharded(kernel_init, *axes):
    """Names the mesh axes that each dimension of a parameter is split over."""
    return nn.with_partitioning(kernel_init, axes)


NORMAL = nn.initializers.normal(0.02)
KERNEL = nn.initializers.lecun_normal()
enter = partial(nn.Dense, kernel_init=sharded(KERNEL, "fsdp", "tensor"))
leave = partial(
    nn.Dense, WIDTH, use_bias=False, kernel_init=sharded(KERNEL, "tensor", "fsdp")
)


class Block(nn.Module):
    """Attention and a feed-forward network, or what one device does of them.

    Inside `shard_map` a device has `heads` and `hidden` units of its own, and the
    results of all are summed over the mesh axes in `tensor`.
    """

    heads: int
    hidden: int
    tensor: tuple[str, ...]

    @nn.compact
    def __call__(self, x):
        units = 3 * self.heads * (WIDTH // HEADS)
        y = enter(units, use_bias=False)(nn.LayerNorm()(x))
        y = y.reshape(*x.shape[:-1], self.heads, -1)
        y = jax.nn.dot_product_attention(*jnp.split(y, 3, axis=-1), is_causal=True)
        x += jax.lax.psum(leave()(y.reshape(*x.shape[:-1], -1)), self.tensor)
        bias_init = sharded(nn.initializers.zeros, "tensor")
        y = nn.gelu(enter(self.hidden, bias_init=bias_init)(nn.LayerNorm()(x)))
        return x + jax.lax.psum(leave()(y), self.tensor)


class Model(nn.Module):
    """Scores the next character at every place of a text.

    Of linen, not nnx: parameters, gradients and specs are plain trees of one shape,
    which is what `shard_map` takes.
    """

    shards: int = 1  # among which the heads and hidden units are divided
    tensor: tuple[str, ...] = ()  # the mesh axes of these shards, inside shard_map

    @nn.compact
    def __call__(self, characters):
        embed = partial(nn.Embed, embedding_init=sharded(NORMAL, "fsdp", None))
        places = jnp.arange(characters.shape[-1])
        x = embed(CHARACTERS, WIDTH)(characters) + embed(CONTEXT, WIDTH)(places)
        for _ in range(LAYERS):
            x = Block(HEADS // self.shards, HIDDEN // self.shards, self.tensor)(x)
        head = nn.Dense(CHARACTERS, kernel_init=sharded(KERNEL, "fsdp", None))
        return head(nn.LayerNorm()(x))


def nats_per_character(model: Model, params, batch):
    """Measures the mean cross-entropy of all but the first character."""
    scores: Any = model.apply({"params": params}, batch[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, batch[:, 1:])
    return losses.mean()


def loss_of_pieces(mesh: Mesh, specs):
    """Makes the same loss, of one device's pieces of the parameters and the batch.

    JAX differentiates the collectives: the gradient of a gathered parameter comes back
    by a reduce-scatter, that of a parameter which all devices have by a sum.
    """
    model = Model(mesh.shape["tensor"], ("tensor",))

    def gather(piece, spec):
        if "fsdp" not in spec:
            return piece
        return jax.lax.all_gather(piece, "fsdp", axis=spec.index("fsdp"), tiled=True)

    def loss(params, batch):
        params = jax.tree.map(gather, params, specs)
        return jax.lax.pmean(nats_per_character(model, params, batch), READERS)

    return loss


def make_optimizer(clip) -> optax.GradientTransformation:
    """Puts a clip before SGD, which obeys it. Adam would hide a wrong factor."""
    return optax.chain(clip, optax.sgd(LEARNING_RATE, momentum=MOMENTUM))


@jax.jit
def init_params():
    """Draws the parameters, each with the names of the axes that it is split over."""
    return Model().init(jax.random.key(0), jnp.zeros((1, CONTEXT), int))["params"]


def init_state(optimizer):
    """Starts the optimizer. Its momentum has the same names, what the clip saw none."""
    params = init_params()
    return params, optimizer.init(params)


def state_specs(optimizer):
    """Lists how parameters and optimizer state are split, as the model says."""
    return nn.get_partition_spec(jax.eval_shape(partial(init_state, optimizer)))


def update(optimizer, state, grads):
    """Moves the parameters by what the optimizer makes of their gradient."""
    params, opt_state = state
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def train_step(optimizer, loss_fn, state, batch):
    """Trains on a batch, on a device alone or on a mesh: the clip sees to its norm."""
    loss, grads = jax.value_and_grad(loss_fn)(state[0], batch)
    state = update(optimizer, state, grads)
    stats = optaxclip.summary(state)
    return state, Record(loss, stats["clip/norm"], stats["clip/factor"])


def on_one_device(optimizer, device) -> Setting:
    """Shards nothing."""
    step = partial(train_step, optimizer, partial(nats_per_character, Model()))
    sharding = SingleDeviceSharding(device)
    state = jax.tree.map(lambda spec: sharding, state_specs(optimizer))
    return Setting(optimizer, state, sharding, step)


def under_jit(optimizer, mesh: Mesh) -> Setting:
    """Shards the same step, by saying where its arguments are."""
    step = partial(train_step, optimizer, partial(nats_per_character, Model()))
    state, batch = on_mesh(mesh, state_specs(optimizer)), on_mesh(mesh, P(READERS))
    return Setting(optimizer, state, batch, step)


def in_shard_map(optimizer, mesh: Mesh) -> Setting:
    """Runs the step on each device. The clip reads in the types which axes to sum."""
    specs = state_specs(optimizer)
    step = jax.shard_map(
        partial(train_step, optimizer, loss_of_pieces(mesh, specs[0])),
        mesh=mesh,
        in_specs=(specs, P(READERS)),
        out_specs=(specs, P()),
    )
    return Setting(optimizer, on_mesh(mesh, specs), on_mesh(mesh, P(READERS)), step)


def with_local_norms(optimizer, mesh: Mesh) -> Setting:
    """Does the same with a clip that doesn't know of the mesh. Don't do this.

    Its factor differs from device to device, and so do the updates of the parameters
    that should be the same on all. The types would tell: `shard_map` raises. Hence a
    second one with `check_vma=False`, as much code has, for the optimizer; the gradient
    keeps its types, for without them it would be wrong as well.
    """
    specs, batch = state_specs(optimizer), P(READERS)
    loss_and_grad = jax.shard_map(
        jax.value_and_grad(loss_of_pieces(mesh, specs[0])),
        mesh=mesh,
        in_specs=(specs[0], batch),
        out_specs=(P(), specs[0]),
    )

    def update_pieces(state, grads):
        norms = jax.lax.all_gather(optax.tree.norm(grads), AXES)  # to look at them
        return update(optimizer, state, grads), norms

    update_on_mesh = jax.shard_map(
        update_pieces,
        mesh=mesh,
        in_specs=(specs, specs[0]),
        out_specs=(specs, P()),
        check_vma=False,
    )

    def step(state, batch):
        loss, grads = loss_and_grad(state[0], batch)
        state, norms = update_on_mesh(state, grads)
        return state, Record(loss, norms, jnp.minimum(1, MAX_NORM / norms))

    return Setting(optimizer, on_mesh(mesh, specs), on_mesh(mesh, batch), step)


def make_settings(mesh: Mesh) -> dict[str, Setting]:
    """Makes the four settings, by the names they have in table and figure."""
    optimizer = make_optimizer(optaxclip.clip_by_global_norm(MAX_NORM))
    unaware = make_optimizer(optax.clip_by_global_norm(MAX_NORM))
    return {
        "one device": on_one_device(optimizer, mesh.local_devices[0]),
        "jit": under_jit(optimizer, mesh),
        "shard_map": in_shard_map(optimizer, mesh),
        "local norms": with_local_norms(unaware, mesh),
    }


def make_mesh() -> Mesh:
    """Takes the accelerators, at most 8, or virtual devices of the CPU.

    Neighbours on the axis fsdp are far apart, in two processes where there are some, so
    that a norm is a sum over processes. For speed do the opposite.
    """
    devices = jax.devices() if jax.device_count() > 1 else jax.devices("cpu")
    count = max(count for count in MESHES if count <= len(devices))
    data, fsdp, tensor = MESHES[count]
    grid = np.array(devices[:count]).reshape(fsdp, data, tensor)
    return Mesh(grid.transpose(1, 0, 2), AXES)


def on_mesh(mesh: Mesh, specs):
    """Turns specs into shardings."""
    return jax.tree.map(partial(NamedSharding, mesh), specs)


def standard_library() -> np.ndarray:
    """Joins sources that every Python has, and numbers their characters."""
    text = ""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if len(text) < TEXT_LENGTH:
            text += path.read_text(encoding="utf-8", errors="replace")
    return np.frombuffer(text[:TEXT_LENGTH].encode("ascii", "replace"), np.uint8)


def take_batch(text: np.ndarray, step: int) -> np.ndarray:
    """Draws `[batch, characters + 1]`, the same for a step whoever asks."""
    draw = np.random.default_rng(step)
    starts = draw.integers(text.size - CONTEXT, size=(BATCH_SIZE, 1))
    return text[starts + np.arange(CONTEXT + 1)].astype(np.int32)


def put(array, sharding) -> jax.Array:
    """Gives each device its piece, of an array that every process has."""
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def first_state(setting: Setting):
    """Draws the state, the same bits in all settings, and spreads it over the devices.

    What is too large for one is drawn in place: `jit(init, out_shardings=shardings)`.
    """
    return jax.tree.map(put, nn.unbox(init_state(setting.optimizer)), setting.state)


def train(
    setting: Setting,
    text: np.ndarray,
    steps: int,
    on_step: Callable[[], object] = lambda: None,
):
    """Trains in one setting; returns the parameters and what was recorded."""
    state = first_state(setting)
    out_shardings = (setting.state, None)
    step = jax.jit(setting.step, donate_argnums=0, out_shardings=out_shardings)
    records = []
    for i in range(steps):
        # Accelerators would round what they multiply, in each layout another way.
        with jax.default_matmul_precision("float32"):
            state, record = step(state, put(take_batch(text, i), setting.batch))
        # Virtual devices share few cores: no step may start before all have ended.
        jax.block_until_ready(state)
        records.append(jax.device_get(record))
        on_step()
    return state[0], Record(*map(np.stack, zip(*records, strict=True)))


def copies_apart(mesh: Mesh, params) -> float:
    """Measures the largest difference between two copies of a parameter."""
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, params)

    def difference(piece, spec):
        axes = tuple(axis for axis in AXES if axis not in spec)  # of the copies
        return jnp.max(jax.lax.pmax(piece, axes) - jax.lax.pmin(piece, axes))

    def largest(params):
        differences = jax.tree.leaves(jax.tree.map(difference, params, specs))
        return jax.lax.pmax(jnp.stack(differences).max(), AXES)

    mapped = jax.shard_map(
        largest, mesh=mesh, in_specs=(specs,), out_specs=P(), check_vma=False
    )
    return float(jax.jit(mapped)(params))


def deviation(values: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Returns the relative deviation of each step, of the device that is worst."""
    values = values.reshape(len(truth), -1)
    return np.abs(values / truth[:, None] - 1).max(axis=1)


def print_table(records: dict[str, Record], apart: dict[str, float]) -> None:
    """Prints one aligned line per setting."""
    columns = "{:12} {:>8} {:>10} {:>9} {:>9}  {:>11} {:>8}".format
    print(columns("", "final", "largest", "deviation", "of the", "difference", "steps"))
    print(columns("setting", "loss", "loss", "norm", "factor", "of copies", "clipped"))
    truth = records["one device"]
    for name, record in records.items():
        cells = [f"{record.loss[-LAST:].mean():.4f}"]
        cells += [f"{deviation(*x).max():.1e}" for x in zip(record, truth, strict=True)]
        cells += [f"{apart[name]:.1e}" if name in apart else "-"]
        print(columns(name, *cells, f"{np.mean(record.factor < 1):.0%}"))


def plot_records(records: dict[str, Record], path: Path) -> None:
    """Draws loss, norm, and how far the norm is off. Lines that agree get thinner."""
    from matplotlib import rcParams  # imported here, for it takes most of a second
    from matplotlib.figure import Figure

    rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "savefig.dpi": 120})
    figure = Figure(figsize=(8, 9), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    for i, (name, record) in enumerate(records.items()):
        steps = np.arange(1, len(record.loss) + 1)
        style = dict(zip(("color", "linewidth", "linestyle"), STYLES[i], strict=True))
        top.plot(steps, record.loss, label=name, **style)
        norms = record.norm.reshape(len(steps), -1)
        middle.plot(steps, norms, **style)
        if i > 0:
            off = deviation(record.norm, records["one device"].norm)
            bottom.plot(steps, np.maximum(off, 1e-8), **style)
    middle.axhline(MAX_NORM, color="k", linewidth=1, linestyle=":", label="threshold")
    middle.legend(loc="upper right", frameon=False)
    top.legend(loc="upper right", frameon=False)
    top.set(ylabel="loss (nats per character)")
    middle.set(yscale="log", ylabel="norm before the clip\n(red: of each device)")
    bottom.set(yscale="log", ylabel="relative deviation of the norm")
    bottom.set(xlabel="step")
    figure.savefig(path)


def whole_number(text: str) -> int:
    """Reads an option that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text!r}")
    return int(text)


def parse_options(arguments) -> argparse.Namespace:
    """Reads the options, and makes the folder for the figure."""
    parser = argparse.ArgumentParser(description="Trains a transformer on a mesh.")
    add = parser.add_argument
    add("--steps", type=whole_number, help="updates per setting (default 80)")
    processes = "that share 8 virtual devices of the CPU (default 1)"
    add("--processes", type=int, choices=(1, 2, 4), default=1, help=processes)
    add("--join", nargs=2, help=argparse.SUPPRESS)  # what --processes starts
    add("--out", type=Path, default=Path("figures"), help="folder of the figure")
    quick = "10 steps unless said otherwise"
    add("--quick", action="store_true", help=quick)
    options = parser.parse_args(arguments)
    options.steps = options.steps or (10 if options.quick else 80)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: expected a folder to write to: {error}")
    return options


def run_processes(count: int, arguments: Sequence[str], timeout: float) -> None:
    """Runs this file in several processes, of which the first prints and draws.

    Raises:
      SystemExit: one of them failed, or they took too long. All are stopped then.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))  # at a port that is free
        address = f"localhost:{probe.getsockname()[1]}"
    command = [sys.executable, __file__, *arguments, "--join", address]
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(tempfile.TemporaryFile("w+"))
        processes = []
        for number in range(count):
            out = log if number > 0 else None  # the first has the terminal
            process = subprocess.Popen([*command, str(number)], stdout=out, stderr=out)
            stack.enter_context(process)  # waits for its end, ...
            stack.callback(process.kill)  # ... which comes at once, whatever happens
            processes.append(process)
        error = wait(processes, timeout)
        log.seek(0)
        if error:
            wrote = log.read() or "nothing"
            sys.exit(f"\n{error} What all but process 0 wrote:\n{wrote}")


def wait(processes: Sequence[subprocess.Popen], timeout: float) -> str:
    """Waits until all have ended, or one has failed; says what went wrong."""
    deadline = time.monotonic() + timeout
    while True:
        codes = [process.poll() for process in processes]
        for number, code in enumerate(codes):
            if code:  # the others would wait for it
                return f"Process {number} ended with exit code {code}."
        if None not in codes:
            return ""
        if time.monotonic() > deadline:
            return f"Expected the processes to end within {timeout:g} s."
        time.sleep(0.1)


def join(address: str, number: int, count: int) -> None:
    """Makes this process one of several on the CPU."""
    # Gloo talks to the standard output of C: keep that for our own.
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, count, number)


def progress_bar(**options) -> tqdm:
    """Makes a bar that does not guess the time left: much of it goes into compiling."""
    form = "{l_bar}{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}]"
    return tqdm(desc="compiling and training", bar_format=form, **options)


def main(arguments: Sequence[str] | None = None) -> dict[str, Record]:
    """Trains in all settings, prints the table, and draws the figure.

    Returns what was recorded, by setting; nothing where other processes trained.
    """
    start = time.perf_counter()
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_options(arguments)
    if options.processes > 1 and not options.join:
        run_processes(options.processes, arguments, TIMEOUT)
        return {}
    with contextlib.suppress(RuntimeError):  # JAX runs already, and has its devices
        jax.config.update("jax_num_cpu_devices", DEVICES // options.processes)
    if options.join:
        join(options.join[0], int(options.join[1]), options.processes)
    mesh, text = make_mesh(), standard_library()
    settings, first = make_settings(mesh), jax.process_index() == 0
    records, apart = {}, {}
    total = len(settings) * options.steps
    with progress_bar(total=total, unit="steps", disable=not first) as bar:
        for name, setting in settings.items():
            params, records[name] = train(setting, text, options.steps, bar.update)
            if setting.batch.num_devices > 1:
                apart[name] = copies_apart(mesh, params)
    if first:
        print_table(records, apart)
        print(
            f"{options.steps} steps on {' x '.join(map(str, mesh.devices.shape))}"
            f" devices ({mesh.devices.flat[0].device_kind}), in {options.processes}"
            f" process(es): {time.perf_counter() - start:.1f} s."
        )
        path = options.out / "sharded_transformer.png"
        plot_records(records, path)
        print(f"Figure: {path}")
    return records


if __name__ == "__main__":
    main()
