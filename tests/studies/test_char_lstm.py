"""The character LSTM runs, and shows what its first lines say it shows."""

import contextlib
import importlib
import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

STUDIES = Path(__file__).parents[2] / "benchmarks" / "studies"
CHUNKS = [10, 50]  # of the quick mode


@pytest.fixture(scope="module")
def char_lstm():
    """Imports the study from its folder, as running it as a script does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STUDIES))
        yield importlib.import_module("char_lstm")


@pytest.fixture(scope="module")
def quick(char_lstm, tmp_path_factory):
    """Runs the quick mode once: the histories, the output, the folder of figures."""
    folder = tmp_path_factory.mktemp("figures") / "new" / "folder"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        histories = char_lstm.main(["--quick", "--out", str(folder)])
    return histories, printed.getvalue(), folder


def small_network(module, streams, length):
    """Makes a network for five characters, its parameters, and something to read."""
    network = module.Network(5)
    characters = jax.random.randint(jax.random.key(1), (streams, length), 0, 5)
    variables = jax.jit(network.init)(jax.random.key(0), None, characters)
    return network, variables["params"], characters


@pytest.mark.parametrize("chunk", CHUNKS)
def test_only_the_large_learning_rate_without_a_clip_fails(char_lstm, quick, chunk):
    unclipped, *others = quick[0][chunk].held_out
    assert not (unclipped < char_lstm.BROKEN).any()
    assert np.max(others) < 3.5  # guessing costs log(95) = 4.6


@pytest.mark.parametrize("chunk", CHUNKS)
def test_norms_are_those_before_the_clip(char_lstm, quick, chunk):
    norm, clipped = quick[0][chunk].norm, quick[0][chunk].clipped
    # A seed gives the same first step in all settings, for nothing is updated yet.
    np.testing.assert_allclose(norm[1:, :, 0] - norm[0, :, 0], 0, atol=1e-5)
    assert (norm[1:] > 5 * char_lstm.MAX_NORM).all()
    np.testing.assert_array_equal(clipped.mean(axis=(1, 2)), [0, 1, 1, 0])


def test_the_table_names_all_settings_and_the_best_clipped_run_writes(quick):
    _, printed, _ = quick
    names = "no clip", "global norm 0.01", "values within 0.001", "learning rate 2"
    assert all(printed.count(name) >= len(CHUNKS) for name in names)
    assert "CPU seconds after imports" in printed
    assert "The best clipped run (values within 0.001, chunks of" in printed
    assert len(printed.split("--- and writes\n")[1].split("---\nFigures")[0]) >= 200


@pytest.mark.parametrize("name", ["norms", "loss"])
def test_figures_are_written_and_named(quick, name):
    _, printed, folder = quick
    path = folder / f"characters_{name}.png"
    assert path.stat().st_size > 10_000
    assert f"\n  {path}\n" in printed


def test_chunks_go_on_where_the_last_one_ended_and_round_the_text(char_lstm):
    chunks = char_lstm.take_chunks(np.arange(80), 4, range(1, 5))
    assert chunks.shape == (4, char_lstm.STREAMS, 5)
    np.testing.assert_array_equal(
        chunks[0, :2], [[4, 5, 6, 7, 8], [14, 15, 16, 17, 18]]
    )
    np.testing.assert_array_equal(chunks[1:, :, 0], chunks[:-1, :, -1])
    np.testing.assert_array_equal(chunks[2, -1], [2, 3, 4, 5, 6])


def test_the_loss_of_two_chunks_is_that_of_the_whole_where_the_state_goes_along(
    char_lstm,
):
    network, params, characters = small_network(char_lstm, 2, 9)
    loss = jax.jit(char_lstm.nats_per_character, static_argnums=0)
    whole, _ = loss(network, params, None, characters)
    first, state = loss(network, params, None, characters[:, :5])
    second, _ = loss(network, params, state, characters[:, 4:])
    np.testing.assert_allclose((first + second) / 2, whole, rtol=1e-6)
    forgetful, _ = loss(network, params, None, characters[:, 4:])
    assert abs(forgetful - second) > 1e-4


def test_penalties_count_the_kernels_and_not_the_biases(char_lstm):
    network, params, characters = small_network(char_lstm, 2, 3)
    params = jax.tree.map(lambda leaf: jnp.full_like(leaf, -0.5), params)
    setting = char_lstm.Setting(1.0, l1=0.1, l2=0.01)
    loss, (plain, _) = jax.jit(char_lstm.penalized_loss, static_argnums=1)(
        params, network, setting, None, characters
    )
    units = char_lstm.UNITS
    weights = 4 * units * (5 + units) + 5 * units
    np.testing.assert_allclose(loss - plain, weights * 0.0525, rtol=1e-5)


def test_rare_characters_become_one_and_the_end_is_held_out(char_lstm):
    rare = "".join(map(chr, range(1000, 1300)))
    text = char_lstm.encode("ab" * 400 + rare)
    assert len(text.vocabulary) == char_lstm.VOCABULARY_SIZE
    assert (text.train.size, text.held_out.size) == (990, 110)
    replaced = text.vocabulary.index(char_lstm.REPLACEMENT)
    assert (text.held_out == replaced).sum() == 300 - 253  # beside a, b and itself
    assert char_lstm.encode("ab" * 400).vocabulary == "ab"


def test_bytes_that_are_not_utf8_are_read_too(char_lstm, tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("é".encode("latin-1") + b"ab" * 500)
    out = str(tmp_path / "figures")
    _, text = char_lstm.parse_options(["--text", str(path), "--quick", "--out", out])
    assert text.vocabulary == "ab" + char_lstm.REPLACEMENT


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--seeds", "0", "expected a whole number >= 1, got '0'"),
        ("--steps", "ten", "expected a whole number >= 1, got 'ten'"),
        ("--chunk", "-5", "expected a whole number >= 1, got '-5'"),
        ("--learning-rate", "0", "expected a number > 0, got '0'"),
        ("--learning-rate", "inf", "expected a number > 0, got 'inf'"),
        ("--l1", "-1", "expected a number >= 0, got '-1'"),
        ("--l2", "much", "expected a number >= 0, got 'much'"),
        ("--out", __file__, "expected a folder to write to"),
        ("--text", "missing.txt", "expected a file to read: [Errno 2]"),
    ],
)
def test_bad_options_say_what_was_expected(char_lstm, capsys, option, value, message):
    with pytest.raises(SystemExit) as exit_info:
        char_lstm.main([f"{option}={value}"])
    assert exit_info.value.code == 2
    assert f"argument {option}: {message}" in capsys.readouterr().err


def test_a_short_text_is_refused(char_lstm, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("abc" * 1000)
    with pytest.raises(SystemExit):
        char_lstm.main(["--text", str(tmp_path / "short.txt"), "--chunk", "5", "400"])
    assert (
        "argument --text: expected at least 6400 characters for 8 streams of chunks of"
        " 400, got 3000: give a longer text or a smaller --chunk"
    ) in " ".join(capsys.readouterr().err.split())
