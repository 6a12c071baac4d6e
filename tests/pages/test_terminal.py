"""What is seen in a terminal: `live` and `status`."""

import io
import sys

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich.console
import rich.live

import small_runs
from helpers import oc

GRADS = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.6, 0.8])}


def printed(history):
    """What a terminal of 80 columns shows, line by line."""
    console = rich.console.Console(width=80, file=io.StringIO(), record=True)
    console.print(oc.live(history))
    return [line.rstrip() for line in console.export_text().split("\n")]


def state_of(clip, grads=GRADS, steps=1):
    state = clip.init(GRADS)
    for _ in range(steps):
        _, state = clip.update(grads, state, GRADS)
    return state


def test_the_view_has_the_status_two_lines_of_bars_and_the_leaves():
    history = small_runs.dead()
    lines = printed(history)
    assert lines[0] == oc.status(history)
    assert [line.split()[0] for line in lines[1:3]] == ["loss", "norm"]
    norms = {k[5:]: x for k, x in history.items() if k.startswith("norm/")}
    rows = {line.split()[0]: line for line in lines[4:] if line}
    assert [*rows] == [*norms]
    for path, x in norms.items():
        dead = f"dead since {np.flatnonzero(x)[-1] + 1}"
        assert rows[path].endswith(dead) == (x[-1] == 0)
        assert float(rows[path].split()[1]) == pytest.approx(x[-1], rel=5e-3)
    assert max(map(len, lines)) <= 80


def test_a_bar_is_as_high_as_its_number_on_a_log_scale_and_a_cross_if_not_finite():
    steps = [1.0, 10.0, 1e7, 1e3, np.nan, np.inf, 1.0]
    assert "norm ▁▂█▄xx▁" in printed({"norm": steps})
    assert "loss ▅▁█" in printed({"loss": [0.0, -1.0, 1.0]})
    assert "loss ▁▁" in printed({"loss": [2.0, 2.0]})


def test_a_leaf_that_grew_or_is_not_finite_is_marked_by_a_word():
    level = np.ones(300)
    grown = np.where(np.arange(300) < 230, 1.0, 11.0)
    bad = np.where(np.arange(300) < 250, 1.0, np.nan)
    lines = printed(
        {"norm/a": level, "norm/b": grown, "norm/c": bad, "norm/d": 0 * bad}
    )
    marks = {line[0]: line for line in lines if line[1:2] == " "}
    assert marks["a"].endswith("%")
    assert marks["b"].endswith("growing")
    assert marks["c"].endswith("not finite since 250")
    assert marks["d"].endswith("not finite since 250")


def test_of_many_leaves_the_largest_and_the_marked_are_shown_the_others_counted():
    history = {f"norm/block_{i}/kernel": np.full(20, 1.0 + i) for i in range(250)}
    history["norm/block_3/kernel"] = np.zeros(20)
    lines = printed(history)
    shown = [line for line in lines if line.startswith("block")]
    numbers = [int(line.split("/")[0].removeprefix("block_")) for line in shown]
    assert numbers == [3, *range(242, 250)]
    assert "always 0" in shown[0]
    assert lines[-2] == "and 241 more"


def test_if_too_many_are_marked_those_left_out_are_counted():
    history = {f"norm/{i}": np.zeros(9) for i in range(40)} | {"norm/x": np.ones(9)}
    assert "and 17 more, 16 of them marked" in printed(history)


def test_a_path_is_no_markup_and_a_long_one_keeps_its_end():
    lines = printed({f"norm/{'up/' * 20}[bold]w": np.ones(3)})
    (row,) = [line for line in lines if line.startswith("…")]
    assert row.split()[0].endswith("/up/[bold]w")


def test_it_can_be_watched_live():
    stream = io.StringIO()
    console = rich.console.Console(width=80, file=stream, force_terminal=True)
    with rich.live.Live(console=console, auto_refresh=False) as view:
        for steps in 5, 6:
            history = {"loss": np.arange(1.0, steps + 1)}
            view.update(oc.live(history), refresh=True)
    assert "step 5  loss 6" in stream.getvalue()


def test_without_rich_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.text", None)
    with pytest.raises(ImportError, match=r'pip install "optaxclip\[looking\]"'):
        oc.live({"loss": [1.0]})


def test_the_line_of_a_state_and_that_of_its_summary_are_one():
    state = state_of(oc.clip_by_global_norm(1.0))
    line = "loss 0.53  norm 5.1  clip 1  x0.196  clipped 100 %"
    assert oc.status(state, loss=0.53) == line
    assert oc.status({"opt": (state,)}, loss=jnp.float32(0.53)) == line
    assert oc.status(oc.summary(state, GRADS), loss=0.53) == line
    assert oc.status(dict(oc.summary(state)), epoch=3).startswith("epoch 3  norm 5.1")


def test_of_many_scopes_it_is_the_largest_norm_and_the_smallest_factor():
    state = state_of(oc.clip_by_leaf_norm({"a": 2.0, "b": 3.0}))
    line = "norm 5  clip 2  x0.4  clipped 50 %"
    assert oc.status(state) == oc.status(oc.summary(state, GRADS)) == line


def test_of_several_clips_it_is_the_first():
    clips = optax.chain(oc.clip_by_global_norm(2.0), oc.clip_by_leaf_norm(1.0))
    assert oc.status(state_of(clips)) == "norm 5.1  clip 2  x0.392  clipped 100 %"


def test_an_infinite_threshold_is_not_named():
    state = state_of(oc.clip_by_global_norm(jnp.inf))
    assert oc.status(state) == "norm 5.1  clipped 0 %"


def test_a_guard_says_how_often_it_skipped():
    guarded = oc.skip_if_nonfinite(oc.clip_by_global_norm(1.0))
    bad = {"a": GRADS["a"] * jnp.nan, "b": GRADS["b"]}
    state = state_of(guarded, bad, steps=2)
    assert oc.status(state).endswith("skipped 2")


def test_the_line_of_a_history_has_step_loss_and_the_share_of_the_whole_run():
    history = small_runs.dead()
    words = dict(x.rsplit(" ", 1) for x in oc.status(history).split("  ") if " " in x)
    assert words["step"] == "639"
    assert float(words["loss"]) == pytest.approx(history["loss"][-1], rel=5e-3)
    assert float(words["norm"]) == pytest.approx(history["norm"][-1], rel=5e-3)
    share = 100 * history["clipped"].mean()
    assert f"  clip 600  x1  clipped {share:.0f} %  skipped 0" in oc.status(history)


def test_without_a_clip_it_says_so():
    with pytest.raises(ValueError, match="state of an optimizer with a clip"):
        oc.status({"lr": 0.1})


def test_the_share_of_a_leaf_is_that_of_the_squares():
    lines = printed({"norm/a": np.full(9, 3.0), "norm/b": np.full(9, 4.0)})
    assert [line.split("  ")[-1].strip() for line in lines[3:5]] == ["36 %", "64 %"]
