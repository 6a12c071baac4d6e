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
    python benchmarks/studies/sharded_transformer.py          # 30 s on two cores
    python benchmarks/studies/sharded_transformer.py --quick  # 25 s, mostly compiling

Expected (largest relative deviation from one device in any of 80 steps):
                loss at the end    of loss    of norm    copies differ by
    jit                   2.49       9e-4       0.05           0
    shard_map             2.49       8e-4       0.04           0
    local norms           2.54       0.06        1.7           0.2
The first three agree to 1e-6 in the first steps; then SGD amplifies what rounding
begins (with the sources of Python 3.13 as the text, and to other digits on another
machine). With local norms no two devices of a replica clip alike: what they hold in
common, and should be equal on all of them, drifts apart, silently.

The mesh is 8 virtual devices of the CPU, 2 x 2 x 2, or two to eight accelerators. One
figure is written: loss, norm before the clip, and how far the norm is off.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import _figures
import _study
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _figures import LIMIT
from char_lstm import standard_library
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P, SingleDeviceSharding
from matplotlib.figure import Figure

import optaxclip

FULL = {"steps": 80}
QUICK = {"steps": 10}
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
LAST = 10  # steps over which the final loss is averaged
LINES: tuple[dict[str, Any], ...] = (  # of the settings
    {"color": "0.75", "linewidth": 7},
    {"color": "#0072B2", "linewidth": 3},
    {"color": "#D55E00", "linestyle": (0, (4, 3))},
    {"color": "#009E73", "linestyle": (0, (1, 1))},
)


class Record(NamedTuple):
    """What one step measured; or all steps, along a first axis."""

    loss: Any  # nats per character, before the update
    norm: Any  # of the gradient before the clip; one per device where it is local


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
    """Attention and a feed-forward network, or what one device does of them."""

    heads: int  # inside `shard_map`: of a device's own, as are the hidden units
    hidden: int
    tensor: tuple[str, ...]  # the mesh axes over which devices sum their results

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

    Of linen, not nnx: parameters, gradients and specs are plain trees of one shape.
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
    return state, Record(loss, optaxclip.summary(state)["clip/norm"])


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

    The types would tell, and `shard_map` raise. Hence a second one for the optimizer,
    with `check_vma=False`, as much code has; the gradient keeps its types, for without
    them it would be wrong as well.
    """
    specs, batch = state_specs(optimizer), P(READERS)
    mapped = partial(jax.shard_map, mesh=mesh)
    loss_and_grad = mapped(
        jax.value_and_grad(loss_of_pieces(mesh, specs[0])),
        in_specs=(specs[0], batch),
        out_specs=(P(), specs[0]),
    )

    def update_pieces(state, grads):
        norms = jax.lax.all_gather(optax.tree.norm(grads), AXES)  # to look at them
        return update(optimizer, state, grads), norms

    update_on_mesh = mapped(
        update_pieces,
        in_specs=(specs, specs[0]),
        out_specs=(specs, P()),
        check_vma=False,
    )

    def step(state, batch):
        loss, grads = loss_and_grad(state[0], batch)
        state, norms = update_on_mesh(state, grads)
        return state, Record(loss, norms)

    return Setting(optimizer, on_mesh(mesh, specs), on_mesh(mesh, batch), step)


def make_settings(mesh: Mesh) -> dict[str, Setting]:
    """Makes the four settings, by the names they have in table and figure."""
    optimizer = make_optimizer(optaxclip.clip_by_global_norm(MAX_NORM))
    unaware = make_optimizer(optax.clip_by_global_norm(MAX_NORM))
    specs, alone = state_specs(optimizer), SingleDeviceSharding(mesh.devices.flat[0])
    step = partial(train_step, optimizer, partial(nats_per_character, Model()))
    on_one_device = jax.tree.map(lambda spec: alone, specs)
    batch = on_mesh(mesh, P(READERS))
    return {
        "one device": Setting(optimizer, on_one_device, alone, step),
        "jit": Setting(optimizer, on_mesh(mesh, specs), batch, step),
        "shard_map": in_shard_map(optimizer, mesh),
        "local norms": with_local_norms(unaware, mesh),
    }


def make_mesh() -> Mesh:
    """Takes the accelerators, at most 8, or virtual devices of the CPU."""
    devices = jax.devices() if jax.device_count() > 1 else jax.devices("cpu")
    count = max(count for count in MESHES if count <= len(devices))
    return Mesh(np.array(devices[:count]).reshape(MESHES[count]), AXES)


def on_mesh(mesh: Mesh, specs):
    """Turns specs into shardings."""
    return jax.tree.map(partial(NamedSharding, mesh), specs)


def take_batch(text: str, step: int) -> np.ndarray:
    """Draws `[batch, characters + 1]`, the same for a step whoever asks."""
    codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8)
    draw = np.random.default_rng(step)
    starts = draw.integers(codes.size - CONTEXT, size=(BATCH_SIZE, 1))
    return codes[starts + np.arange(CONTEXT + 1)].astype(np.int32)


def first_state(setting: Setting):
    """Draws the state, the same bits in all settings, and spreads it over the devices.

    What is too large for one is drawn in place: `jit(init, out_shardings=shardings)`.
    """
    return jax.device_put(nn.unbox(init_state(setting.optimizer)), setting.state)


def train(
    setting: Setting,
    text: str,
    steps: int,
    on_step: Callable[[], object] = lambda: None,
):
    """Trains in one setting; returns the parameters and what was recorded."""
    state = first_state(setting)
    step = jax.jit(setting.step, donate_argnums=0, out_shardings=(setting.state, None))
    records = []
    for i in range(steps):
        # Accelerators would round what they multiply, in each layout another way.
        with jax.default_matmul_precision("float32"):
            batch = jax.device_put(take_batch(text, i), setting.batch)
            state, record = step(state, batch)
        # Virtual devices share few cores: no step may start before all have ended.
        jax.block_until_ready(state)
        records.append(jax.device_get(record))
        on_step()
    return state[0], Record(*map(np.stack, zip(*records, strict=True)))


def copies_apart(params) -> float:
    """Measures the largest difference between two copies of a parameter."""
    apart = [0.0]
    for leaf in jax.tree.leaves(params):
        places = {}
        for shard in leaf.addressable_shards:
            places.setdefault(str(shard.index), []).append(np.asarray(shard.data))
        apart += [np.ptp(copies, axis=0).max() for copies in places.values()]
    return float(max(apart))


def deviation(values: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Returns the relative deviation of each step, of the device that is worst."""
    values = values.reshape(len(truth), -1)
    return np.abs(values / truth[:, None] - 1).max(axis=1)


def print_records(records: dict[str, Record], apart: dict[str, float]) -> None:
    """Prints one line per setting."""
    heads = ["setting", "final\nloss", "largest deviation\nof the loss", "of the\nnorm"]
    heads += ["copies\ndiffer by", "steps\nclipped"]
    rows = []
    for name, record in records.items():
        row = [name, f"{record.loss[-LAST:].mean():.4f}"]
        for values, truth in zip(record, records["one device"], strict=True):
            row.append(f"{deviation(values, truth).max():.1e}")
        row += [f"{apart[name]:.1e}", f"{(record.norm > MAX_NORM).mean():.0%}"]
        rows.append(row)
    _study.print_table(heads, rows)


def plot_records(records: dict[str, Record]) -> Figure:
    """Draws loss, norm, and how far the norm is off. Lines that agree get thinner."""
    figure, axes = _figures.new_figure(3, 1, (9, 10), sharex=True)
    (top, middle, bottom), truth = axes[:, 0], records["one device"]
    steps = np.arange(1, len(truth.loss) + 1)
    for (name, record), style in zip(records.items(), LINES, strict=True):
        norms = record.norm.reshape(len(steps), -1)
        top.plot(steps, record.loss, label=name, **style)
        middle.plot(steps, np.stack([norms.min(axis=1), norms.max(axis=1)], 1), **style)
        if record is not truth:
            bottom.plot(steps, deviation(norms, truth.norm), label=name, **style)
    middle.axhline(MAX_NORM, label=f"the threshold {MAX_NORM:g}", **LIMIT)
    top.set(ylabel="loss, nats per character")
    middle.set(yscale="log", ylabel="norm of the gradient, before the clip")
    middle.set_title("local norms: the lowest and the highest of the devices")
    bottom.set(yscale="log", xlabel="step", ylabel="relative error of the norm")
    bottom.set_title("what rounding begins, SGD amplifies")
    for ax in axes[:, 0]:
        ax.legend(fontsize=9)
    message = "A clip on a mesh sees the norm of one device; local norms are wrong"
    figure.suptitle(message)
    return figure


def main(arguments: Sequence[str] | None = None) -> dict[str, Record]:
    """Trains in all settings, prints the table, and draws the figure."""
    start = time.perf_counter()
    parser = _study.option_parser("Trains a transformer on a mesh.", FULL, QUICK)
    options = _study.parse_options(parser, arguments, QUICK)
    with contextlib.suppress(RuntimeError):  # JAX runs already, and has its devices
        jax.config.update("jax_num_cpu_devices", DEVICES)
    mesh, text = make_mesh(), standard_library()[:TEXT_LENGTH]
    settings, records, apart = make_settings(mesh), {}, {}
    total = len(settings) * options.steps
    with _study.progress_bar(total=total, unit="steps") as bar:
        for name, setting in settings.items():
            params, records[name] = train(setting, text, options.steps, bar.update)
            apart[name] = copies_apart(params)
    print_records(records, apart)
    shape = " x ".join(map(str, mesh.devices.shape))
    print(f"{options.steps} steps on {shape} devices {_study.took(start)}.")
    draw = partial(plot_records, records)
    _figures.save_all({"sharded_transformer": draw}, options.out)
    return records


if __name__ == "__main__":
    main()
