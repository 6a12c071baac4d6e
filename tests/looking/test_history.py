"""What a run did, seen in memory: what `history` makes of it."""

import csv
import json
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st

import optaxclip

PARAMS = {"a": {"k": jnp.ones(3)}, "b": jnp.ones(2)}
SCALES = [0.1, 2.0, np.nan, 3.0, np.inf, 0.2]  # of the updates, which are ones
NORMS = np.array(SCALES) * np.sqrt(5)


def run(tx, scales=SCALES, params=None):
    def step(state, scale):
        updates = jax.tree.map(lambda x: x * scale, PARAMS)
        _, state = tx.update(updates, state, PARAMS)
        return state, optaxclip.summary(state, params)

    return jax.lax.scan(step, tx.init(PARAMS), jnp.array(scales, jnp.float32))[1]


@pytest.fixture(scope="module")
def guarded():
    return run(optaxclip.skip_if_nonfinite(optaxclip.clip_by_global_norm(1.0)))


def rows_of(stacked):
    return [jax.tree.map(operator.itemgetter(i), stacked) for i in range(len(SCALES))]


def assert_same(one, other):
    assert list(one) == list(other)
    for name, column in one.items():
        np.testing.assert_array_equal(column, other[name], err_msg=name)
        assert column.dtype == other[name].dtype, name


def test_a_stacked_summary_becomes_columns_with_the_norm_before_the_clip():
    seen = run(optaxclip.clip_by_global_norm(1.0))
    found = optaxclip.history({"loss": jnp.arange(6.0), **seen})
    np.testing.assert_allclose(found["norm"], NORMS, rtol=1e-6)
    assert found["step"].tolist() == [0, 1, 2, 3, 4, 5]
    assert found["width"].tolist() == [1] * 6
    assert found["nonfinite"].tolist() == [0, 0, 1, 0, 1, 0]
    assert found["clipped"][[0, 1, 3, 5]].tolist() == [0, 1, 1, 0]
    np.testing.assert_array_equal(found["clip/norm"], seen["clip/norm"])


def test_columns_have_their_order_and_dtypes():
    found = optaxclip.history(
        {"lr": [1, 1], "norm": [2, 3], "x": [0, 1], "loss": [1, 2]}
    )
    kinds = {name: column.dtype.kind for name, column in found.items()}
    assert list(kinds.items()) == [
        *(("step", "i"), ("width", "i"), ("loss", "f"), ("norm", "f")),
        *(("learning_rate", "f"), ("nonfinite", "i"), ("x", "f")),
    ]


def test_numbers_in_names_are_numbers_in_their_order():
    seen = {f"norm/Dense_{i}/kernel": [1.0] for i in (10, 2, 1)}
    names = [x for x in optaxclip.history(seen) if x.startswith("norm/")]
    assert names == [f"norm/Dense_{i}/kernel" for i in (1, 2, 10)]


def test_norms_of_leaves_are_named_by_params_and_their_total_is_the_global_norm():
    found = optaxclip.history(run(optaxclip.clip_by_leaf_norm(1.0)), PARAMS)
    np.testing.assert_allclose(found["norm/a/k"], np.array(SCALES) * 3**0.5, rtol=1e-6)
    np.testing.assert_allclose(found["norm/b"], np.array(SCALES) * 2**0.5, rtol=1e-6)
    np.testing.assert_allclose(found["norm"], NORMS, rtol=1e-6)


def test_without_params_scopes_are_numbered():
    found = optaxclip.history(run(optaxclip.clip_by_leaf_norm(1.0)))
    assert [x for x in found if x.startswith("norm/")] == ["norm/0", "norm/1"]


def test_the_total_of_norms_neither_overflows_nor_counts_a_module_and_its_leaves():
    large = optaxclip.history({"norm/a": [3e200, 0.0], "norm/b": [4e200, 0.0]})
    np.testing.assert_allclose(large["norm"], [5e200, 0.0])
    nested = optaxclip.history({"norm/a": [5.0], "norm/a/k": [3.0], "norm/a/b": [4.0]})
    assert "norm" not in nested


def test_of_several_clips_the_first_saw_the_norm_before_any():
    clips = optaxclip.clip_by_leaf_norm(1.0), optaxclip.clip_by_global_norm(1.0)
    found = optaxclip.history(run(optax.chain(*clips)), PARAMS)
    np.testing.assert_allclose(found["norm"], NORMS, rtol=1e-6)
    np.testing.assert_allclose(found["clip_1/norm"][1], 2**0.5, rtol=1e-6)


def test_after_a_clip_by_value_no_norm_is_taken_for_the_one_before():
    clips = optaxclip.clip_by_value(1.0), optaxclip.clip_by_global_norm(1.0)
    found = optaxclip.history(run(optax.chain(*clips)), PARAMS)
    assert "norm" not in found
    assert found["nonfinite"].tolist() == [0, 0, 1, 0, 1, 0]


def test_a_clip_by_value_alone_is_a_history():
    found = optaxclip.history(run(optaxclip.clip_by_value(1.0)), PARAMS)
    np.testing.assert_allclose(found["clip/largest/b"], SCALES, rtol=1e-6)
    assert "clipped" not in found


def test_the_norm_of_a_part_of_the_params_is_not_the_global_one():
    parts: dict[Any, Any] = {
        "x": optaxclip.clip_by_global_norm(1.0),
        "y": optax.identity(),
    }
    found = optaxclip.history(run(optax.partition(parts, {"a": {"k": "x"}, "b": "y"})))
    assert "norm" not in found
    assert found["clipped"].tolist() == [0, 1, 0, 1, found["clipped"][4], 0]


def test_what_a_clip_saw_before_a_skipped_step_is_not_told_of_that_step(guarded):
    found = optaxclip.history({"loss": SCALES, **guarded})
    assert np.isnan(found["norm"]).tolist() == [False, False, True, False, True, False]
    assert found["skipped"].tolist() == [0, 0, 1, 0, 1, 0]
    assert found["clipped"].tolist() == [0, 1, 0, 1, 0, 0]
    assert found["nonfinite"].tolist() == [0, 0, 1, 0, 1, 0]
    assert found["step"].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_guard_inside_and_a_guard_around_count_the_same_steps(guarded):
    clip, sgd = optaxclip.clip_by_global_norm(1.0), optax.sgd(0.1)
    inside = run(optax.chain(clip, optaxclip.skip_if_nonfinite(sgd)))
    for seen in (rows_of(inside)[1::2], rows_of(guarded)[1::2]):
        found = optaxclip.history(seen)
        assert found["step"].tolist() == [1, 3, 5]
        assert found["width"].tolist() == [2, 2, 2]
        assert found["skipped"].tolist() == [0, 1, 1]
        assert found["clipped"].tolist() == [1, 1, 0]


def test_a_row_for_several_steps_counts_the_clipped_ones():
    scales = [2.0, 2.0, 0.1, 2.0, 0.1, 0.1]
    seen = rows_of(run(optaxclip.clip_by_global_norm(1.0), scales))
    assert optaxclip.history(seen[2::3])["clipped"].tolist() == [2, 1]


def test_of_a_resumed_run_nothing_from_before_its_first_row_is_counted(guarded):
    found = optaxclip.history(rows_of(guarded)[3:])
    assert found["skipped"].tolist() == [0, 1, 0]
    assert found["step"].tolist() == [3, 4, 5]


def test_counts_that_begin_anew_are_counted_anew(guarded):
    found = optaxclip.history(rows_of(guarded) * 2)
    assert found["skipped"].tolist() == [0, 0, 1, 0, 1, 0] * 2
    assert found["clipped"].tolist() == [0, 1, 0, 1, 0, 0] * 2


def test_micro_steps_without_an_update_have_no_norm():
    steps = optax.MultiSteps(optaxclip.clip_by_global_norm(1.0), 2)
    found = optaxclip.history(run(steps, [1.0, 1.0, 3.0, 1.0, 0.1, 0.1]))
    expected = np.array([np.nan, 1, np.nan, 2, np.nan, 0.1]) * np.sqrt(5)
    np.testing.assert_allclose(found["norm"], expected, rtol=1e-6)
    assert found["clipped"].tolist() == [0, 1, 0, 1, 0, 0]
    assert found["nonfinite"].tolist() == [0] * 6


def test_a_list_of_summaries_is_the_same_history_as_the_stacked_one():
    tx = optaxclip.skip_if_nonfinite(optaxclip.clip_by_leaf_norm(1.0))
    stacked = run(tx)
    listed = optaxclip.history(rows_of(stacked), PARAMS)
    del listed["guard/culprit/a/k"]  # which has its name at the end of some steps only
    assert_same(listed, optaxclip.history(stacked, PARAMS))


def test_a_list_on_the_device_is_fetched_in_one_transfer(monkeypatch, guarded):
    calls, get = [], jax.device_get

    def counting(seen):
        calls.append(any(isinstance(x, jax.Array) for x in jax.tree.leaves(seen)))
        return get(seen)

    monkeypatch.setattr(jax, "device_get", counting)
    found = optaxclip.history(
        [{"loss": jnp.ones(()), "seen": x} for x in rows_of(guarded)]
    )
    assert sum(calls) == 1
    assert found["loss"].tolist() == [1.0] * 6


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_a_loss_of_any_dtype_is_a_loss(dtype):
    losses = jnp.array([1.5, 0.25], dtype)
    assert optaxclip.history({"loss": losses})["loss"].tolist() == [1.5, 0.25]
    listed = optaxclip.history([{"loss": x} for x in losses])
    assert listed["loss"].tolist() == [1.5, 0.25]


def test_mappings_in_mappings_and_one_row_are_read():
    found = optaxclip.history({"train": {"loss": 1.5, "grad_norm": 2.0}, "step": 7})
    assert [found[x].tolist() for x in ("step", "loss", "norm")] == [[7], [1.5], [2.0]]


def test_keras_columns_keep_the_validation_apart():
    seen = {"loss": [2.0, np.nan], "val_loss": [1.0, np.nan], "lr": [0.1, 0.1]}
    found = optaxclip.history(seen)
    np.testing.assert_array_equal(found["loss"], [2.0, np.nan])
    np.testing.assert_array_equal(found["val_loss"], [1.0, np.nan])
    assert found["nonfinite"].tolist() == [0, 1]


def test_columns_of_words_neither_shift_the_others_nor_hide_evaluations():
    seen = {"split": ["train", "val", "train"], "loss": [2, 9, 1], "norm": [5, None, 6]}
    found = optaxclip.history(seen)
    assert [*found] == ["step", "width", "loss", "norm", "nonfinite"]
    assert [found["loss"].tolist(), found["norm"].tolist()] == [[2, 1], [5, 6]]
    rows = [
        dict(zip(seen, row, strict=True)) for row in zip(*seen.values(), strict=True)
    ]
    assert_same(optaxclip.history(rows), found)


def test_columns_with_nan_for_what_is_missing_keep_the_rows_of_training():
    seen = {"step": [9, 10, 19], "loss": [2.0, np.nan, 1.0]}
    found = optaxclip.history(seen | {"val_loss": [np.nan, 3.0, np.nan]})
    assert [found[x].tolist() for x in ("step", "nonfinite")] == [[9, 19], [0, 0]]


def test_lists_that_differ_in_length_are_no_column():
    found = optaxclip.history({"shapes": [[1], [1, 2]], "loss": [2.0, 1.0]})
    assert [*found] == ["step", "width", "loss", "nonfinite"]


def test_columns_in_which_the_step_goes_back_are_divided_into_runs():
    found = optaxclip.history({"step": [10, 20, 10, 20], "loss": [3.0, 2.0, 3.1, 2.1]})
    assert found["run"].tolist() == [0, 0, 1, 1]
    assert found["width"].tolist() == [10] * 4


def test_a_share_of_an_epoch_in_columns_is_no_step():
    found = optaxclip.history({"update": [0.5, 1.0, 1.5], "loss": [3.0, 2.0, 1.0]})
    assert found["step"].tolist() == [0, 1, 2]


def test_in_a_list_what_is_missing_is_not_nonfinite():
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None, "norm": 1.0}]
    found = optaxclip.history([*rows, {"step": 3, "loss": np.nan, "norm": 1.0}])
    np.testing.assert_array_equal(found["loss"], [2.0, np.nan, np.nan])
    assert found["nonfinite"].tolist() == [0, 0, 1]


def test_a_summary_that_is_in_some_rows_only_counts_on(guarded):
    rows = rows_of(guarded)
    seen = [{"loss": 1.0, **(row if i % 2 else {})} for i, row in enumerate(rows)]
    found = optaxclip.history(seen)
    assert found["skipped"].tolist() == [0, 0, 0, 1, 0, 1]
    assert found["clipped"].tolist() == [0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("seen", "error", "message"),
    [
        (
            {"loss": np.ones((3, 2))},
            ValueError,
            r"shapes \{'loss': \(3, 2\)\}.*take one",
        ),
        (
            {"loss": [1], "norm": [1, 2]},
            ValueError,
            "columns of one length, one number",
        ),
        ([{"loss": np.ones(3)}], ValueError, r"each row.*\(3,\) for loss\. Of a batch"),
        ({"accuracy": [1, 2]}, ValueError, "column with the loss .*, got accuracy"),
        ([{"eval_loss": 1.0}], ValueError, "column with the loss .*, got eval_loss"),
        ([], TypeError, "Expected the state of an optimizer .* got list"),
        ([1.0, 2.0], TypeError, "Expected the state of an optimizer .* got list"),
        (7, TypeError, "Expected the state of an optimizer .* got int"),
    ],
)
def test_what_is_no_history_says_what_is(seen, error, message):
    with pytest.raises(error, match=message):
        optaxclip.history(seen)


numbers = st.floats(width=64) | st.integers(-3, 3).map(float)
names = st.sampled_from(["loss", "norm", "learning_rate", "norm/a/k", "clip/norm", "x"])


@st.composite
def histories(draw):
    length = draw(st.integers(1, 6))
    column = st.lists(numbers, min_size=length, max_size=length)
    seen = draw(st.dictionaries(names, column, min_size=1)) | {"loss": draw(column)}
    gaps = draw(st.lists(st.integers(1, 9), min_size=length, max_size=length))
    return optaxclip.history(seen | {"step": np.cumsum(gaps)})


@given(histories())
def test_a_history_is_its_own_history(found):
    assert_same(optaxclip.history(found), found)


@given(histories())
def test_a_history_survives_an_npz_file(tmp_path_factory, found):
    path = tmp_path_factory.mktemp("npz") / "run.npz"
    np.savez(path, **found)
    assert_same(optaxclip.history(path), found)


@given(histories())
def test_a_history_survives_a_csv_file(tmp_path_factory, found):
    path = tmp_path_factory.mktemp("csv") / "run.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(found)
        writer.writerows(zip(*(x.tolist() for x in found.values()), strict=True))
    assert_same(optaxclip.history(path), found)


@given(histories())
def test_a_history_survives_lines_of_json(tmp_path_factory, found):
    path = tmp_path_factory.mktemp("jsonl") / "run.jsonl"
    rows = zip(*(x.tolist() for x in found.values()), strict=True)
    path.write_text(
        "\n".join(json.dumps(dict(zip(found, x, strict=True))) for x in rows)
    )
    assert_same(optaxclip.history(path), found)


def test_several_runs_in_a_history_survive_a_file(tmp_path):
    seen = {"step": [0, 1, 0, 1], "run": [0, 0, 1, 1], "loss": [2.0, 1.0, 1.0, 1.0]}
    seen |= {"width": [1] * 4, "nonfinite": [0] * 4}
    found: dict[str, Any] = {**optaxclip.history(seen)}
    np.savez(tmp_path / "run.npz", **found)
    (tmp_path / "run.json").write_text(
        json.dumps({name: column.tolist() for name, column in found.items()})
    )
    assert found["run"].tolist() == [0, 0, 1, 1]
    assert_same(optaxclip.history(tmp_path / "run.npz"), found)
    assert_same(optaxclip.history(tmp_path / "run.json"), found)
