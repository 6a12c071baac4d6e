"""The character LSTM runs, and shows what its first lines say it shows."""

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.thorough

LENGTH = 10  # characters of a chunk


@pytest.fixture(scope="module")
def char_lstm(study):
    return study("char_lstm")


@pytest.fixture(scope="module")
def quick(run_study):
    """Runs the quick mode once, on one length of the chunks."""
    return run_study("char_lstm", "--quick", "--chunk", str(LENGTH))


def test_only_the_large_learning_rate_without_a_clip_fails(char_lstm, quick):
    unclipped, *others = quick[0][LENGTH].held_out
    assert not (unclipped < char_lstm.BROKEN).any()
    assert np.max(others) < 3.5  # guessing costs log(95) = 4.6


def test_norms_are_those_before_the_clip(char_lstm, quick):
    norm, clipped = quick[0][LENGTH].norm, quick[0][LENGTH].clipped
    # A seed gives the same first step in all settings, for nothing is updated yet.
    np.testing.assert_allclose(norm[1:, :, 0] - norm[0, :, 0], 0, atol=1e-5)
    assert (norm[1:] > 5 * char_lstm.MAX_NORM).all()
    np.testing.assert_array_equal(clipped.mean(axis=(1, 2)), [0, 1, 1, 0])


def test_table_and_figure_are_written_and_named(char_lstm, quick):
    _, printed, folder = quick
    assert all(f"   {LENGTH}, {name} " in printed for name in char_lstm.SETTINGS)
    path = folder / "characters.png"
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
    network = char_lstm.Network(5)
    characters = jax.random.randint(jax.random.key(1), (2, 9), 0, 5)
    params = jax.jit(network.init)(jax.random.key(0), None, characters)["params"]
    loss = jax.jit(char_lstm.nats_per_character, static_argnums=1)
    whole, _ = loss(params, network, None, characters)
    first, state = loss(params, network, None, characters[:, :5])
    second, _ = loss(params, network, state, characters[:, 4:])
    np.testing.assert_allclose((first + second) / 2, whole, rtol=1e-6)
    forgetful, _ = loss(params, network, None, characters[:, 4:])
    assert abs(forgetful - second) > 1e-4


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
        ("--chunk", "-5", "expected a whole number >= 1, got '-5'"),
        ("--text", "missing.txt", "expected a file to read: [Errno 2]"),
    ],
)
def test_bad_options_say_what_was_expected(
    char_lstm, capsys, tmp_path, option, value, message
):
    with pytest.raises(SystemExit) as exit_info:
        char_lstm.main([f"{option}={value}", "--out", str(tmp_path)])
    assert exit_info.value.code == 2
    assert f"argument {option}: {message}" in capsys.readouterr().err


def test_a_short_text_is_refused(char_lstm, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("abc" * 1000)
    options = ["--text", str(tmp_path / "short.txt"), "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        char_lstm.main([*options, "--chunk", "5", "400"])
    assert (
        "argument --text: expected at least 6400 characters for 8 streams of chunks of"
        " 400, got 3000: give a longer text or a smaller --chunk"
    ) in " ".join(capsys.readouterr().err.split())
