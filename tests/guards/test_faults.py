"""A bad batch leaves no trace: neither in the params nor in any state of the optimizer.

Long runs with bad batches among the good ones, drawn by seed, against the runs that
never saw those: bit by bit. Then runs that are killed, and go on from a checkpoint.

`STEPS = 10_000` is the long form, which takes a minute or two.
"""

import functools
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import helpers
from helpers import oc
from optaxclip import thresholds
from optaxclip._mesh import collectives

STEPS = 2_000
BAD_SHARE = 0.01
WARMUP_STEPS = 64  # of the rule, which knows nothing before
BURST = range(300, 320)  # all of them NaN, twice as many as raise the alarm
FACTOR = 1000.0  # of the targets of a batch out of scale
MAX_NORM = 30.0  # a good batch has at most 20, one out of scale at least 100
ROWS, INPUTS, OUTPUTS = 8, 4, 8  # one row, or one output, for each device

OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.01, momentum=0.9),
    "adam": lambda: optax.adam(0.01),
    "adafactor": lambda: optax.adafactor(0.01, min_dim_size_to_factor=4),
    "lion": lambda: optax.lion(0.001),
}
GUARDS = {
    "skip_if_nonfinite": oc.skip_if_nonfinite,
    "skip_if_spike": lambda inner: oc.skip_if_spike(inner, threshold=MAX_NORM),
    "skip_if_spike_by_the_past": lambda inner: oc.skip_if_spike(
        inner,
        threshold=thresholds.mean_plus_std(8.0, window=128, warmup_steps=WARMUP_STEPS),
    ),
}
KINDS = {  # of bad batches, by guard
    "skip_if_nonfinite": ("nan", "inf"),
    "skip_if_spike": ("nan", "inf", "scaled"),
    "skip_if_spike_by_the_past": ("nan", "inf", "scaled"),
}
PLACES = {  # two ways on devices, of which each optimizer goes one
    "sgd": ("plain", "around_multi_steps", "replicated"),
    "adam": ("plain", "around_multi_steps", "sharded"),
    "adafactor": ("plain", "around_multi_steps", "replicated"),
    "lion": ("plain", "around_multi_steps", "sharded"),
}
CASES = [f"{name} {place}" for name, places in PLACES.items() for place in places]
CHECKPOINT_EVERY = 60  # steps, of the runs that are killed


class Batches(NamedTuple):
    """All batches of a run, ``[steps, ...]``, and which of them are bad."""

    x: np.ndarray
    y: np.ndarray
    is_bad: np.ndarray


@functools.cache
def make_batches(kinds: tuple[str, ...], steps: int = STEPS) -> Batches:
    """Draws a linear regression, and spoils some of its batches.

    One element is NaN or infinite, so that on a mesh one device alone sees it, or all
    targets are out of scale.
    """
    rng = np.random.default_rng(0)
    x = rng.normal(size=(steps, ROWS, INPUTS)).astype(np.float32)
    noise = 0.3 * rng.normal(size=(steps, ROWS, OUTPUTS))
    weights = rng.normal(size=(INPUTS, OUTPUTS))
    y = (x @ weights + noise).astype(np.float32)
    is_bad = rng.random(steps) < BAD_SHARE
    is_bad[:WARMUP_STEPS] = False
    is_bad[BURST.start : BURST.stop + 1] = False  # nor the one after it
    for i in np.flatnonzero(is_bad):
        row, column = rng.integers(ROWS), rng.integers(OUTPUTS)
        kind = kinds[rng.integers(len(kinds))]
        if kind == "scaled":
            y[i] *= FACTOR
        else:
            y[i, row, column] = {"nan": np.nan, "inf": np.inf}[kind]
    y[BURST.start : BURST.stop, 3, 5] = np.nan
    is_bad[BURST.start : BURST.stop] = True
    return Batches(x, y, is_bad)


def make_params() -> Any:
    return {
        "b": jnp.zeros(OUTPUTS),
        "unused": jnp.full(OUTPUTS, -0.0),  # to which 0.0 must not be added
        "w": jnp.zeros((INPUTS, OUTPUTS)),
    }


def mean_loss(params, x, y):
    return 0.5 * jnp.mean(jnp.sum((x @ params["w"] + params["b"] - y) ** 2, axis=-1))


def loss_on_devices(params, x, y):
    """Each device has a row, and the loss is the mean over all of them."""
    return jax.lax.pmean(mean_loss(params, x, y), "devices")


def loss_of_outputs(params, x, y):
    """Each device has an output of its own, and its params: there is nothing to sum."""
    return mean_loss(params, x, y)


def make_run(optimizer, loss_fn):
    """Returns a function that trains on the batches of an order, up to a count."""

    def run(params, x, y, order, count):
        def step(carry, i):
            params, opt_state = carry
            grads = jax.grad(loss_fn)(params, x[i], y[i])
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        carry = params, optimizer.init(params)
        if jax.sharding.get_abstract_mesh().manual_axes:
            # A loop inside `shard_map` ends with the types that it starts with.
            carry = jax.tree.map(collectives.vary_like, carry, step(carry, 0))
        return jax.lax.fori_loop(0, count, lambda i, c: step(c, order[i]), carry)

    return run


def on_devices(run, specs):
    """Makes a run on eight devices, which returns what each of them ends with."""

    def on_each(*args):
        device = jax.lax.axis_index("devices")
        return jax.tree.map(
            lambda x: collectives.vary_like(jnp.asarray(x)[None], device), run(*args)
        )

    mesh = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
    return jax.shard_map(
        on_each, mesh=mesh, in_specs=(*specs, P(), P()), out_specs=P("devices")
    )


@functools.cache
def make_trainer(guard: str, name: str, place: str):
    """Compiles once what runs on all batches, and on the good ones alone."""
    inner: Any = optax.chain(oc.clip_by_global_norm(5.0), OPTIMIZERS[name]())
    if place == "around_multi_steps":
        inner = optax.MultiSteps(inner, every_k_schedule=3)
    optimizer = GUARDS[guard](inner)
    if place == "replicated":
        run = make_run(optimizer, loss_on_devices)
        run = on_devices(run, (P(), P(None, "devices"), P(None, "devices")))
    elif place == "sharded":
        params = {"b": P("devices"), "unused": P("devices"), "w": P(None, "devices")}
        run = make_run(optimizer, loss_of_outputs)
        run = on_devices(run, (params, P(), P(None, None, "devices")))
    else:
        run = make_run(optimizer, mean_loss)
    return jax.jit(run)


def train(guard: str, name: str, place: str, order: np.ndarray):
    batches = make_batches(KINDS[guard])
    padded = np.resize(order, len(batches.x)).astype(np.int32)
    return make_trainer(guard, name, place)(
        make_params(), batches.x, batches.y, padded, len(order)
    )


@pytest.mark.parametrize(("guard", "case"), helpers.in_turn([*GUARDS], CASES))
def test_a_bad_batch_leaves_no_trace(guard, case):
    name, place = case.split()
    # Eight devices that wait for each other are slow.
    steps = STEPS // 2 if place in ("replicated", "sharded") else STEPS
    is_bad = make_batches(KINDS[guard]).is_bad[:steps]
    params, state = train(guard, name, place, np.arange(steps))
    same_params, same_state = train(guard, name, place, np.flatnonzero(~is_bad))
    for tree, same in (
        (params, same_params),
        (state.guarded_state, same_state.guarded_state),
        (state.rule_state, same_state.rule_state),
    ):
        assert helpers.bits(tree) == helpers.bits(same)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
    # Nothing bad was let through, and nothing good was lost by what was bad.
    seen, skipped = np.unique(state.step_count), np.unique(state.skipped_count)
    assert seen == steps
    assert skipped == is_bad.sum() + np.unique(same_state.skipped_count)
    if guard != "skip_if_spike_by_the_past":
        assert skipped == is_bad.sum()


def resumable_optimizer():
    """Two guards, of which the inner one and its rule have a history to lose."""
    rule = thresholds.mean_plus_std(8.0, window=32, warmup_steps=WARMUP_STEPS)
    inner = optax.chain(oc.clip_by_global_norm(5.0), optax.adam(0.01))
    return oc.skip_if_nonfinite(oc.skip_if_spike(inner, threshold=rule))


@functools.cache
def resumable_step():
    optimizer = resumable_optimizer()

    @jax.jit
    def step(params, opt_state, x, y):
        grads = jax.grad(mean_loss)(params, x, y)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def train_from_last_checkpoint(folder: Path, steps: int, dies_at: int | None = None):
    """Goes on where the last complete checkpoint was written; returns its end.

    Where it dies it does so at once, a checkpoint perhaps half written.
    """
    batches = make_batches(KINDS["skip_if_spike"])
    params = make_params()
    carry: Any = (params, resumable_optimizer().init(params))
    with orbax.checkpoint.CheckpointManager(folder) as manager:
        first = manager.latest_step() or 0
        if first:
            like = orbax.checkpoint.args.StandardRestore(carry)
            carry = manager.restore(first, args=like)
        for i in range(first, steps):
            if i == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            carry = resumable_step()(*carry, batches.x[i], batches.y[i])
            if (i + 1) % CHECKPOINT_EVERY == 0:
                save = orbax.checkpoint.args.StandardSave(carry)
                manager.save(i + 1, args=save)
    return first, carry


@pytest.mark.thorough
def test_a_killed_run_goes_on_from_its_checkpoint_with_the_same_bits(tmp_path):
    steps = (
        800  # with the burst, after which histories differ from those of a fresh run
    )
    dies_at = int(np.random.default_rng(0).integers(BURST.start, steps))
    process = multiprocessing.get_context("spawn").Process(
        target=train_from_last_checkpoint, args=(tmp_path / "killed", steps, dies_at)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    first, resumed = train_from_last_checkpoint(tmp_path / "killed", steps)
    assert 0 < first <= dies_at
    first, whole = train_from_last_checkpoint(tmp_path / "whole", steps)
    assert first == 0
    assert helpers.bits(resumed) == helpers.bits(whole)


def on_mesh(shape: tuple[int, int], carry, optimizer):
    """Spreads params and states over a mesh, each state like the params it is of."""
    mesh = jax.make_mesh(shape, ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)
    specs = {"b": P("rows"), "unused": P(), "w": P("columns", "rows")}
    params, opt_state = carry

    def place(x, spec):
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(place, params, specs), optax.tree.map_params(
        optimizer,
        place,
        opt_state,
        specs,
        transform_non_params=lambda x: place(x, P()),
    )


@pytest.mark.thorough
def test_a_run_goes_on_on_a_mesh_of_another_shape(tmp_path):
    batches, optimizer = make_batches(KINDS["skip_if_spike"]), resumable_optimizer()
    half, steps = BURST.start + 10, BURST.stop + 80  # in the midst of the burst

    def train_on(carry, first, last):
        for i in range(first, last):
            carry = resumable_step()(*carry, batches.x[i], batches.y[i])
            jax.block_until_ready(carry)  # too many collectives at once can hang
        return carry

    params = make_params()
    carry = on_mesh((8, 1), (params, optimizer.init(params)), optimizer)
    at_half = train_on(carry, 0, half)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "half", at_half)
        checkpointer.wait_until_finished()
        like = on_mesh((2, 4), (params, optimizer.init(params)), optimizer)
        restored = checkpointer.restore(tmp_path / "half", like)
    assert helpers.bits(restored) == helpers.bits(at_half)
    shardings = [jax.tree.map(lambda x: x.sharding, tree) for tree in (restored, like)]
    assert shardings[0] == shardings[1]
    resumed, whole = train_on(restored, half, steps), train_on(at_half, half, steps)
    chex.assert_trees_all_close(resumed, whole, rtol=1e-4, atol=1e-6)
    assert resumed[1].step_count == steps
    skipped = resumed[1].skipped_count + resumed[1].guarded_state.skipped_count
    assert skipped == batches.is_bad[:steps].sum()


@pytest.mark.parametrize(
    "optimizer",
    [
        *(guard(optax.sgd(0.1)) for guard in GUARDS.values()),
        oc.zero_nonfinite(),
        oc.clip_by_global_norm(thresholds.mean_plus_std(3.0, decay=0.9)),
    ],
    ids=[*GUARDS, "zero_nonfinite", "mean_plus_std"],
)
def test_a_fresh_state_can_be_donated(optimizer):
    """No two of its arrays are one: outside of `jit` that would be donated twice."""
    params = make_params()
    state = optimizer.init(params)
    step = jax.jit(optimizer.update, donate_argnums=1)
    updates, _ = step(params, state, params)
    chex.assert_tree_all_finite(updates)
