"""The image classifier shows what its first lines say, and reads Fashion-MNIST."""

import contextlib
import gzip
import hashlib
import importlib
import io
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip

STUDIES = Path(__file__).parents[2] / "benchmarks" / "studies"
FILES = tuple(
    f"{half}-{kind}-ubyte"
    for half in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
)
NAMED = "clip_by_leaf_norm=0.1"


@pytest.fixture(scope="module")
def classifier():
    """Imports the study from its folder, as running it as a script does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STUDIES))
        yield importlib.import_module("image_classifier")


@pytest.fixture(scope="module")
def quick(classifier, tmp_path_factory):
    """Runs the quick mode once: the histories, the output, the folder of the figure."""
    folder = tmp_path_factory.mktemp("figures") / "new" / "folder"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        histories = classifier.main(["--quick", "--out", str(folder)])
    return histories, printed.getvalue(), folder


def test_it_guesses_without_a_clip_and_learns_with_any(classifier, quick):
    histories, *_ = quick
    without = histories["no clip"]
    assert (without.loss[:, -1] > classifier.GUESSING).all()
    assert without.accuracy[:, -1].max() < 0.15
    for name, history in histories.items():
        if name != "no clip":
            assert np.median(history.loss[:, -1]) < 1.5, name
            assert np.median(history.accuracy[:, -1]) > 0.35, name


def test_a_smaller_learning_rate_is_compared_too(quick):
    histories, printed, _ = quick
    (baseline,) = (name for name in histories if name.startswith("no clip, rate"))
    assert baseline.split()[-1] in ("0.03", "0.015", "0.01", "0.005")
    tried = printed.split("median train loss: ")[1].split(".\n")[0].split(", ")
    losses = {rate: float(loss[1:-1]) for rate, loss in map(str.split, tried)}
    assert len(losses) == 4
    assert min(losses, key=losses.__getitem__) == baseline.split()[-1]


def test_a_setting_clips_only_where_it_has_a_threshold(quick):
    histories, *_ = quick
    for name, history in histories.items():
        share = history.clipped.mean()
        assert share == 0 if name.startswith("no clip") else share > 0.5, name


def test_the_table_names_all_settings(quick):
    histories, printed, _ = quick
    lines = {name: line for line in printed.splitlines() for name in histories}
    assert set(lines) == set(histories)
    assert "2/2" in next(x for x in printed.splitlines() if x.startswith("no clip"))
    assert "CPU seconds after imports" in printed


def test_the_figure_is_written_and_named(quick):
    _, printed, folder = quick
    path = folder / "image_classifier.png"
    assert path.stat().st_size > 10_000
    assert f"Figure: {path}\n" in printed


def test_a_nan_is_worst_and_not_clipped(classifier):
    runs = np.array([3.0, np.nan, 1.0, 2.0, np.inf])
    np.testing.assert_array_equal(classifier.quartiles(runs), [2.0, 3.0, np.nan])
    grads = {"a": np.array([1.0, np.nan]), "b": np.array([3.0])}
    assert not classifier.differ(grads, grads)
    assert not classifier.differ(grads, {"a": grads["a"], "b": np.array([np.nan])})
    assert classifier.differ(grads, {"a": grads["a"], "b": np.array([2.0])})


def test_a_named_clip_runs_beside_the_others(classifier, monkeypatch, tmp_path, capsys):
    calls = []

    def train(network, setting, named, seeds, epochs, *_):
        calls.append((setting, named))
        curves = np.full((seeds, epochs), 1.0)
        return classifier.History(curves, curves, curves, 0.0)

    monkeypatch.setattr(classifier, "train", train)
    options = ["--quick", "--learning-rate=0.5", f"--out={tmp_path}"]
    histories = classifier.main([*options, "--clip=clip=1", "--clip", NAMED])
    assert list(histories)[4:6] == ["clip=1", NAMED]
    assert f"\n{NAMED}  " in capsys.readouterr().out
    settings, clips = zip(*calls, strict=True)
    assert settings[-2:] == (classifier.Setting(0.5),) * 2
    assert clips[:-2] == (classifier.NO_CLIP,) * 8
    assert clips[-1] != clips[-2] != classifier.NO_CLIP


def test_the_clips_of_a_setting_come_before_the_named_one(classifier):
    inf = np.inf
    settings = classifier.Setting(
        learning_rate=np.full(3, 0.1),
        max_value=np.array([inf, 1.0, inf]),
        max_norm=np.array([inf, inf, 2.0]),
        max_ratio=np.full(3, inf),
    )
    grads = {"head": {"kernel": jnp.array([[3.0], [4.0]])}}

    @jax.jit
    @jax.vmap
    def clipped(setting):
        named = classifier.Named(optaxclip.clip_by_leaf_norm(1.5), of_steps=False)
        clip = classifier.make_clip(setting, named)
        updates, state = clip.update(grads, clip.init(grads), grads)
        return optaxclip.global_norm(updates), state[-1].norms[0]

    norms, measured_by_the_named_one = clipped(settings)
    np.testing.assert_allclose(norms, [1.5, 2**0.5, 1.5], rtol=1e-6)
    np.testing.assert_allclose(measured_by_the_named_one, [5, 2**0.5, 2], rtol=1e-6)


def test_a_clip_of_steps_comes_after_the_learning_rate(classifier):
    _, named = classifier.named_clip("clip_by_relative_step=0.05")
    setting = classifier.Setting(learning_rate=0.5)
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(6, 4)).astype(np.float32)
    data = classifier.Data(x, np.arange(6), x, np.arange(6))
    network = classifier.Network(layers=1, units=3)
    params = network.init(jax.random.key(0), x)["params"]
    batches = np.array([[0, 1, 2], [3, 4, 5], [0, 2, 4]])

    run = classifier.init_run(setting, named, jax.tree.map(lambda w: w[None], params))
    run, (*_, changed) = classifier.train_epoch(
        network, setting, named, run, batches[None], data
    )
    assert changed == 1.0

    steps = optax.scale(-0.5), optaxclip.clip_by_relative_step(0.05), optax.trace(0.9)
    optimizer = optax.chain(*steps)
    state = optimizer.init(params)
    for rows in batches:

        def loss(params, rows=rows):
            scores = network.apply({"params": params}, x[rows])
            return optax.softmax_cross_entropy_with_integer_labels(scores, rows).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(jax.tree.map(lambda w: w[0], run[0]), params, rtol=1e-4)


# ---- The names of clips --------------------------------------------------------------


def test_every_clip_has_a_name_and_nothing_else_has(classifier):
    clips = classifier.named_clips()
    required = classifier.needed
    assert {"adaptive_grad_clip", "clip_by_value", "clip_by_group_norm"} <= set(clips)
    assert "normalize_by_update_norm" in clips
    assert not {"clip_by", "global_norm", "over_axes", "unscale"} & set(clips)
    assert not {name for name in clips if name.startswith(("skip_", "per_example"))}
    for name, build in clips.items():
        _, named = classifier.named_clip(f"{name}=0.5" if required(build) else name)
        assert isinstance(named.clip, optax.GradientTransformationExtraArgs)
    assert set(classifier.STEP_CLIPS) < set(clips)


def test_the_number_is_the_first_argument(classifier):
    for text in ("clip_by_value=2", "clip_by_value=2.0"):
        name, named = classifier.named_clip(text)
        updates, _ = named.clip.update(np.array([3.0, -1.0], np.float32), None)
        assert name == text
        np.testing.assert_array_equal(updates, [2.0, -1.0])


def test_a_clip_that_is_new_in_the_library_has_a_name_at_once(classifier, monkeypatch):
    def newclip(decay: float = 0.9) -> optax.GradientTransformationExtraArgs:
        return optaxclip.clip_by_global_norm(decay)

    monkeypatch.setattr(optaxclip, "newclip", newclip, raising=False)
    assert classifier.named_clip("newclip")[0] == "newclip"


# ---- Fashion-MNIST -------------------------------------------------------------------


def idx(array, magic=None) -> bytes:
    """Writes bytes in the format of the files."""
    header = [0x800 + array.ndim if magic is None else magic, *array.shape]
    return np.array(header, ">i4").tobytes() + array.astype(np.uint8).tobytes()


@pytest.fixture
def arrays():
    """Draws three small images for training and two for testing."""
    generator = np.random.default_rng(0)
    shapes = (3, 28, 28), (3,), (2, 28, 28), (2,)
    return {
        name: generator.integers(256 if "images" in name else 10, size=shape)
        for name, shape in zip(FILES, shapes, strict=True)
    }


@pytest.fixture
def folder(arrays, tmp_path, classifier, monkeypatch):
    """Writes the four files, half of them zipped, and takes them for the real ones."""
    for name, array in arrays.items():
        content = idx(array)
        md5 = hashlib.md5(content).hexdigest()
        monkeypatch.setitem(classifier.CHECKSUMS, name, md5)
        if "train" in name:
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (tmp_path / name).write_bytes(content)
    return tmp_path


def test_reads_the_files_zipped_or_not(classifier, arrays, folder):
    data = classifier.load_fashion(folder)
    images, labels, test_images, test_labels = arrays.values()
    np.testing.assert_allclose(data.x, images.reshape(3, 784) / 255, rtol=1e-6)
    np.testing.assert_allclose(data.test_x, test_images.reshape(2, 784) / 255, 1e-6)
    np.testing.assert_array_equal(data.y, labels)
    np.testing.assert_array_equal(data.test_y, test_labels)
    assert (data.x.dtype, data.y.dtype) == (np.float32, np.int32)
    assert (data.test_x.dtype, data.test_y.dtype) == (np.float32, np.int32)


def write(name, content):
    """Returns a way to spoil the folder: what a file contains instead of its array."""

    def spoil(folder, arrays):
        (folder / f"{name}.gz").unlink(missing_ok=True)
        (folder / name).write_bytes(content(arrays[name]))

    return spoil


def cut_zip(folder, arrays):
    path = folder / f"{FILES[0]}.gz"
    path.write_bytes(path.read_bytes()[:-100])


def no_zip(folder, arrays):
    (folder / f"{FILES[0]}.gz").write_bytes(idx(arrays[FILES[0]]))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder, arrays: (folder / FILES[3]).unlink(),
            f"expected {FILES[3]}.gz or {FILES[3]} in ",
        ),
        (
            write(FILES[0], lambda array: idx(array, magic=2049)),
            "expected the magic number 2051 of images in train-images-idx3-ubyte, got"
            " 2049",
        ),
        (
            write(FILES[3], lambda array: idx(array, magic=2051)),
            "expected the magic number 2049 of labels in t10k-labels-idx1-ubyte, got"
            " 2051",
        ),
        (write(FILES[0], lambda array: b""), "expected the magic number 2051"),
        (
            write(FILES[2], lambda array: idx(array)[:-10]),
            "expected 1584 bytes in t10k-images-idx3-ubyte, whose header says shape"
            " (2, 28, 28), got 1574",
        ),
        (
            write(FILES[2], lambda array: idx(array)[:10]),
            "expected 16 bytes in t10k-images-idx3-ubyte, whose header says shape"
            " (2, 0, 0), got 10",
        ),
        (
            write(FILES[0], lambda array: idx(array[:, :27])),
            "expected images of shape (n, 28, 28) in train-images-idx3-ubyte, got"
            " (3, 27, 28)",
        ),
        (
            write(FILES[1], lambda array: idx(array[:-1])),
            "expected a label for each image, got 3 images in train-images-idx3-ubyte"
            " and 2 labels in train-labels-idx1-ubyte",
        ),
        (
            write(FILES[2], lambda array: idx(255 - array)),
            "expected the MD5 checksum ",
        ),
        (cut_zip, "expected train-images-idx3-ubyte.gz to be zipped: Compressed file"),
        (no_zip, "expected train-images-idx3-ubyte.gz to be zipped: Not a gzipped"),
    ],
)
def test_a_wrong_file_is_named(classifier, capsys, arrays, folder, spoil, message):
    spoil(folder, arrays)
    with pytest.raises(SystemExit):
        classifier.main(["--data-dir", str(folder)])
    error = capsys.readouterr().err
    assert "argument --data-dir: expected " in error
    assert message in error


def test_openml_is_asked_on_demand_alone(classifier, capsys, monkeypatch):
    x, y = np.full((10_001, 2), 255.0), np.full(10_001, "3")
    monkeypatch.setattr(classifier, "fetch_openml", lambda *_, **__: (x, y))
    data = classifier.fetch_fashion()
    assert (len(data.x), len(data.test_x)) == (1, 10_000)
    assert data.x.max() == 1 and data.y.dtype == np.int32 and data.y[0] == 3

    def no_network(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(classifier, "fetch_openml", no_network)
    with pytest.raises(SystemExit):
        classifier.main(["--openml"])
    message = "argument --openml: expected to reach OpenML: no route. Pass the files"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--seeds", "0", "expected a whole number >= 1, got '0'"),
        ("--epochs", "ten", "expected a whole number >= 1, got 'ten'"),
        ("--units", "-8", "expected a whole number >= 1, got '-8'"),
        ("--learning-rate", "0", "expected a number > 0, got '0'"),
        ("--learning-rate", "inf", "expected a number > 0, got 'inf'"),
        ("--learning-rate", "fast", "expected a number > 0, got 'fast'"),
        ("--data-dir", "no/folder", "expected a folder with the files of Fashion-M"),
        ("--clip", "clipp", "expected the name of a clip, got 'clipp'. There are"),
        ("--clip", "summary", "expected the name of a clip, got 'summary'."),
        ("--clip", "clip_by_value", "expected clip_by_value=NUMBER, for its limit has"),
        ("--clip", "clip_by_value=", "expected a number after clip_by_value=, got ''"),
        ("--clip", "clip=x", "expected a number after clip=, got 'x'"),
        ("--clip", "clip_by_value=-1", "clip_by_value: Expected limit >= 0, got -1.0."),
        ("--clip", "zero_nonfinite", "expected the name of a clip, got 'zero_nonfin"),
        ("--out", __file__, "expected a folder to write to"),
    ],
)
def test_bad_options_say_what_was_expected(classifier, capsys, option, value, message):
    with pytest.raises(SystemExit) as exit_info:
        classifier.main([f"{option}={value}"])
    assert exit_info.value.code == 2
    assert f"argument {option}: {message}" in capsys.readouterr().err


def test_the_error_lists_the_names_of_clips(classifier, capsys):
    with pytest.raises(SystemExit):
        classifier.main(["--clip=nothing"])
    error = capsys.readouterr().err
    assert all(name in error for name in classifier.named_clips())
