"""The image classifier shows what its first lines say."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip

pytestmark = pytest.mark.thorough

NAMED = "clip_by_leaf_norm=0.1"


@pytest.fixture(scope="module")
def classifier(study):
    return study("image_classifier")


@pytest.fixture(scope="module")
def quick(run_study):
    """Runs the quick mode once: the histories, the output, the folder of the figure."""
    return run_study("image_classifier", "--quick")


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


def test_the_figure_is_written_and_named(quick):
    _, printed, folder = quick
    path = folder / "image_classifier.png"
    assert path.stat().st_size > 10_000
    assert f"\n  {path}\n" in printed


def test_a_nan_is_no_clipped_gradient(classifier):
    grads = {"a": np.array([1.0, np.nan]), "b": np.array([3.0])}
    assert not classifier.differ(grads, grads)
    assert not classifier.differ(grads, {"a": grads["a"], "b": np.array([np.nan])})
    assert classifier.differ(grads, {"a": grads["a"], "b": np.array([2.0])})


def test_a_named_clip_runs_beside_the_others(classifier, monkeypatch, tmp_path, capsys):
    calls = []

    def train(network, setting, named, seeds, epochs, *_):
        calls.append((setting, named))
        curves = np.full((seeds, epochs), 1.0)
        return classifier.History(curves, curves, curves)

    monkeypatch.setattr(classifier, "train", train)
    options = ["--quick", f"--out={tmp_path}", "--clip=clip=1", "--clip", NAMED]
    histories = classifier.main(options)
    assert list(histories)[4:6] == ["clip=1", NAMED]
    assert f"\n{NAMED}  " in capsys.readouterr().out
    settings, clips = zip(*calls, strict=True)
    assert settings[-2:] == (classifier.Setting(),) * 2
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
        clip = classifier.make_clip(setting, optaxclip.clip_by_leaf_norm(1.5))
        updates, state = clip.update(grads, clip.init(grads), grads)
        return optaxclip.global_norm(updates), state[-1].norms[0]

    norms, measured_by_the_named_one = clipped(settings)
    np.testing.assert_allclose(norms, [1.5, 2**0.5, 1.5], rtol=1e-6)
    np.testing.assert_allclose(measured_by_the_named_one, [5, 2**0.5, 2], rtol=1e-6)


def test_the_number_is_the_first_argument(classifier):
    name, clip = classifier.named_clip("clip_by_value=2")
    updates, _ = clip.update(np.array([3.0, -1.0], np.float32), None)
    assert name == "clip_by_value=2"
    np.testing.assert_array_equal(updates, [2.0, -1.0])
    _, clip = classifier.named_clip("autoclip")
    assert isinstance(clip, optax.GradientTransformationExtraArgs)


def test_openml_is_asked_on_demand_alone(classifier, monkeypatch):
    x, y = np.full((10_001, 2), 255.0), np.full(10_001, "3")
    monkeypatch.setattr(classifier, "fetch_openml", lambda *_, **__: (x, y))
    data = classifier.fetch_fashion()
    assert (len(data.x), len(data.test_x)) == (1, 10_000)
    assert data.x.max() == 1 and data.y.dtype == np.int32 and data.y[0] == 3


@pytest.mark.parametrize(
    "text",
    [
        "clipp",
        "summary",
        "clip_by_value",
        "clip_by_value=",
        "clip=x",
        "clip_by_value=-1",
        "per_example_clipped_grad",
        "clip_by_relative_step=0.03",  # clips steps
    ],
)
def test_a_name_that_is_no_clip_says_what_was_expected(classifier, capsys, text):
    with pytest.raises(SystemExit) as exit_info:
        classifier.main([f"--clip={text}"])
    assert exit_info.value.code == 2
    message = "argument --clip: expected a clip of optaxclip and its first argument"
    error = capsys.readouterr().err
    assert message in error and f"got {text!r}: " in error
