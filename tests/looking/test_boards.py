"""TensorBoard's event files, written by its own package and by `tensorboardX`."""

import importlib

import numpy as np
import pytest
import tensorboardX
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.util.tensor_util import make_tensor_proto

import optaxclip

EVENTS = importlib.import_module("tensorboard.compat.proto.event_pb2")
SUMMARIES = importlib.import_module("tensorboard.compat.proto.summary_pb2")

pytestmark = pytest.mark.thorough


def write(folder, tag, values):
    with tensorboardX.SummaryWriter(str(folder)) as writer:
        for step, value in enumerate(values):
            writer.add_scalar(tag, value, 10 * step)


def test_every_scalar_is_read_not_a_sample(tmp_path):
    losses = np.linspace(3, 1, 12_000)
    write(tmp_path, "train/loss", losses)
    found = optaxclip.history(tmp_path)
    assert found["step"].tolist() == list(range(0, 120_000, 10))
    np.testing.assert_allclose(found["loss"], losses, rtol=1e-6)


def test_scalars_of_the_second_kind_are_read_and_what_is_no_number_is_not(tmp_path):
    writer = EventFileWriter(str(tmp_path))
    for step, loss in enumerate([2.0, float("nan")]):
        summary = SUMMARIES.Summary()
        summary.value.add(tag="loss", tensor=make_tensor_proto(np.float32(loss)))
        summary.value.add(tag="kernel", tensor=make_tensor_proto(np.ones(3)))
        summary.value.add(tag="text", tensor=make_tensor_proto("hello"))
        writer.add_event(EVENTS.Event(step=step, wall_time=0.0, summary=summary))
    writer.close()
    found = optaxclip.history(tmp_path)
    assert [*found] == ["step", "width", "loss", "nonfinite"]
    np.testing.assert_array_equal(found["loss"], [2.0, np.nan])


def test_the_folder_of_the_validation_is_not_the_training(tmp_path):
    write(tmp_path / "train", "epoch_loss", [3, 2, 1])
    write(tmp_path / "validation", "epoch_loss", [9, 9, 9])
    found = optaxclip.history(tmp_path)
    assert found["loss"].tolist() == [3, 2, 1]
    assert found["validation/epoch_loss"].tolist() == [9, 9, 9]


def test_folders_of_several_runs_are_not_mixed(tmp_path):
    write(tmp_path / "one", "loss", [3, 2, 1])
    write(tmp_path / "two", "loss", [9, 9, 9])
    with pytest.raises(ValueError, match="got one/loss, step, two/loss"):
        optaxclip.history(tmp_path)
    assert optaxclip.history(tmp_path / "two")["loss"].tolist() == [9, 9, 9]


def test_a_folder_without_events_is_no_log(tmp_path):
    with pytest.raises(ValueError, match=r"Expected rows with numbers .* found none"):
        optaxclip.history(tmp_path)
