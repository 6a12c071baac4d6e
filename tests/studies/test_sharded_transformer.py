"""The transformer on a mesh runs, and its clip sees one norm in all of its layouts."""

from functools import partial

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import optaxclip

pytestmark = pytest.mark.thorough

NAMES = ["one device", "jit", "shard_map", "local norms"]
AGREEING = NAMES[1:3]
STEPS = 6


@pytest.fixture(scope="module")
def example(study):
    return study("sharded_transformer")


@pytest.fixture(scope="module")
def quick(run_study):
    """Runs the quick mode once: the records, the output, the folder of the figure."""
    return run_study("sharded_transformer", "--quick", "--steps", str(STEPS))


@pytest.fixture(scope="module")
def mesh(example):
    return example.make_mesh()


def copies(leaf):
    """Groups the pieces of an array by their place in it."""
    places = {}
    for shard in leaf.addressable_shards:
        places.setdefault(str(shard.index), []).append(np.asarray(shard.data))
    return places.values()


@pytest.mark.parametrize("name", AGREEING)
def test_one_step_agrees_with_that_of_one_device(quick, name):
    truth, record = quick[0]["one device"], quick[0][name]
    for values, right in zip(record, truth, strict=True):
        np.testing.assert_allclose(values[0], right[0], rtol=2e-6)
        np.testing.assert_allclose(values, right, rtol=1e-4)


def test_local_norms_are_off_from_the_first_step_on(example, quick):
    truth, record = quick[0]["one device"], quick[0]["local norms"]
    np.testing.assert_allclose(record.loss[0], truth.loss[0], rtol=2e-6)
    assert record.norm.shape == (STEPS, 8)  # each device has its own
    assert (record.norm[0] < 0.95 * truth.norm[0]).all()
    off = example.deviation(record.norm, truth.norm)
    assert (off > 0.05).all()
    assert abs(record.loss[1:] / truth.loss[1:] - 1).max() > 0.01


def test_the_norms_of_pieces_make_up_that_of_the_gradient(quick):
    # At the first step, where all parameters agree. Leaves that are whole on several
    # devices count there more than once, so the sum is the true one or more.
    truth, local = quick[0]["one device"].norm[0], quick[0]["local norms"].norm[0]
    one_replica = np.sum(local.reshape(2, 4)[0] ** 2)
    assert truth**2 <= one_replica <= 4 * truth**2
    np.testing.assert_array_equal(local.reshape(2, 4)[0], local.reshape(2, 4)[1])


def test_the_clip_acts_in_the_quick_mode(example, quick):
    for record in quick[0].values():
        assert np.mean(record.norm > example.MAX_NORM) > 0.3


def test_the_table_says_who_agrees(quick):
    _, printed, _ = quick
    lines = [line for line in printed.splitlines() if line.startswith(tuple(NAMES))]
    assert [line[:11].strip() for line in lines] == NAMES
    table = {}
    for line in lines:
        *numbers, clipped = line[11:].split()
        assert clipped.endswith("%")
        table[line[:11].strip()] = list(map(float, numbers))
    truth = table["one device"][0]
    for name in AGREEING:
        assert table[name][0] == pytest.approx(truth, rel=1e-4)
        assert max(table[name][1:3]) < 1e-4
        assert table[name][3] == 0.0  # the copies of a parameter: the same bits
    _, loss, norm, copies = table["local norms"]
    assert loss > 0.01 and norm > 0.3 and copies > 1e-3
    assert f"{STEPS} steps on 2 x 2 x 2 devices on cpu" in printed


def test_the_figure_is_written_and_named(quick):
    _, printed, folder = quick
    path = folder / "sharded_transformer.png"
    assert path.stat().st_size > 10_000
    assert f"\n  {path}\n" in printed


def test_all_settings_start_from_the_same_bits(example, mesh):
    settings = example.make_settings(mesh)
    states = [example.first_state(setting) for setting in settings.values()]
    first, *others = [jax.device_get(params) for params, _ in states]
    for params in others:
        jax.tree.map(np.testing.assert_array_equal, params, first)
    # Drawn in place they are the same as well.
    params = jax.jit(
        lambda: nn.unbox(example.init_params()), out_shardings=settings["jit"].state[0]
    )()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), first)


def test_parameters_are_split_as_the_model_says(example, mesh):
    params, opt_state = example.first_state(example.make_settings(mesh)["shard_map"])
    kernel = params["Block_0"]["Dense_0"]["kernel"]
    assert kernel.sharding.spec == P("fsdp", "tensor")
    assert kernel.addressable_shards[0].data.shape == (16, 48)
    assert opt_state[1][0].trace["Block_0"]["Dense_0"]["kernel"].sharding.spec == (
        P("fsdp", "tensor")
    )
    shapes = {len(same) for leaf in jax.tree.leaves(params) for same in copies(leaf)}
    assert shapes == {2, 4, 8}  # devices that have the same piece


def test_every_step_reads_another_batch_and_all_settings_the_same(example, mesh):
    text = example.standard_library()[: example.TEXT_LENGTH]
    batch = example.take_batch(text, 3)
    assert batch.max() < example.CHARACTERS
    assert batch.shape == (example.BATCH_SIZE, example.CONTEXT + 1)
    np.testing.assert_array_equal(example.take_batch(text, 3), batch)
    assert (example.take_batch(text, 4) != batch).any()
    for setting in example.make_settings(mesh).values():
        np.testing.assert_array_equal(jax.device_put(batch, setting.batch), batch)


def test_types_refuse_the_local_norms(example, mesh):
    local = example.make_optimizer(optax.clip_by_global_norm(1.0))
    specs = example.state_specs(local)
    step = jax.shard_map(
        partial(example.update, local),
        mesh=mesh,
        in_specs=(specs, specs[0]),
        out_specs=specs,
    )
    state = jax.eval_shape(lambda: nn.unbox(example.init_state(local)))
    with pytest.raises(ValueError, match="out_specs"):
        jax.eval_shape(step, state, state[0])


def test_our_clip_refuses_to_work_without_types(example, mesh):
    optimizer = example.make_optimizer(optaxclip.clip_by_global_norm(1.0))
    setting = example.with_local_norms(optimizer, mesh)
    state = jax.eval_shape(lambda: nn.unbox(example.init_state(optimizer)))
    batch = example.take_batch(example.standard_library(), 0)
    with pytest.raises(ValueError, match="check_vma=True"):
        jax.eval_shape(setting.step, state, batch)


def test_copies_that_differ_are_found(example, mesh):
    sharding = jax.NamedSharding(mesh, P("fsdp"))
    place = sharding.devices_indices_map((4,))
    pieces = [
        jax.device_put(np.arange(4.0, dtype=np.float32)[place[device]], device)
        for device in mesh.devices.flat
    ]
    same = jax.make_array_from_single_device_arrays((4,), sharding, pieces)
    assert example.copies_apart({"w": same}) == 0.0
    pieces[-1] = pieces[-1] + 0.5
    apart = jax.make_array_from_single_device_arrays((4,), sharding, pieces)
    assert example.copies_apart({"w": apart}) == 0.5
