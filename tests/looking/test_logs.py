"""Logs of many trainers, torn, repeated and ambiguous: what `history` reads in them."""

import json
import sys

import numpy as np
import pytest

import optaxclip

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def read(tmp_path):
    """Writes a text into a file, and reads the columns asked for."""

    def read(text, *names, file="run.log", encoding="utf-8"):
        path = tmp_path / file
        path.write_bytes(text.encode(encoding))
        found = optaxclip.history(path)
        return [found[name].tolist() for name in names] if names else found

    return read


def same(one, other):
    np.testing.assert_array_equal(np.array(one), np.array(other))


def lines(*rows):
    return "\n".join(json.dumps(row) for row in rows)


# Names.


@pytest.mark.parametrize(
    ("name", "column"),
    [
        *(("train/loss", "loss"), ("Training Loss", "loss"), ("lm loss", "loss")),
        *(("trainLoss", "loss"), ("train/CrossEntropyLoss", "loss")),
        *(("train_loss_step", "loss"), ("train_loss_epoch", "loss")),
        *(("learning/loss", "loss"), ("happy-sun-1 - train/loss", "loss")),
        *(("gnorm", "norm"), ("grdn", "norm"), ("grad norm", "norm")),
        *(("optim/total_grad_norm", "norm"), ("grad_2.0_norm_total", "norm")),
        *(("learning/raw_grad_norm", "norm"), ("grad_norm/global", "norm")),
    ],
)
def test_names_of_trainers_are_known(read, name, column):
    assert read(lines({"step": 1, name: 0.5}), column) == [[0.5]]


@pytest.mark.parametrize(
    "name",
    [
        *("eval_loss", "val/loss", "loss/test", "Validation Loss", "aux_loss"),
        *("param_norm", "update_norm", "grad_norm_clipped", "clipped_grad_norm"),
        *(
            "max_grad_norm",
            "clip_norm",
            "batch_norm",
            "weight_norm",
            "eval/grad_norm/w",
        ),
        *(
            "grad_norm/mean",
            "grad_norm/max",
            "loss_scale",
            "rate",
            "grad_norm/after_clip",
        ),
    ],
)
def test_other_losses_and_norms_are_not_taken_for_those_of_training(read, name):
    with pytest.raises(ValueError, match="column with the loss or with the gradient"):
        read(lines({"step": 1, name: 0.5}, {"step": 2, name: 0.4}))


def test_the_norm_before_the_clip_is_preferred(read):
    row = {"step": 1, "grad_norm": 1.0, "raw_grad_norm": 7.0, "param_norm": 80.0}
    assert read(lines(row), "norm") == [[7.0]]


def test_the_more_frequent_of_two_losses_is_taken(read):
    rows = [{"step": i, "train/loss": 2.0} for i in range(3)]
    assert read(lines(*rows, {"step": 2, "loss": 9.0}), "loss") == [[2.0] * 3]


def test_an_average_is_taken_where_there_is_nothing_better(read):
    assert read(lines({"avg_loss": 3.0, "train/loss": 2.0}), "loss") == [[2.0]]
    assert read(lines({"avg_loss": 3.0}), "loss") == [[3.0]]


def test_a_share_of_an_epoch_is_no_step(read):
    rows = [
        {"update": i / 4, "num_updates": f"{100 * i}", "loss": "2.5"} for i in (1, 2)
    ]
    assert read(lines(*rows), "step", "loss") == [[100, 200], [2.5, 2.5]]
    rows = [{"update": i / 4, "loss": "2.5"} for i in (1, 2)]
    assert read(lines(*rows), "step") == [[0, 1]]


def test_the_step_of_the_run_is_preferred_to_others(read):
    row = {"step": 3, "_step": 77, "global_step": 1003, "loss": 1.0}
    assert read(lines(row), "step") == [[1003]]
    assert read(lines({"_step": 77, "iteration": 3, "loss": 1.0}), "step") == [[3]]


def test_norms_of_scopes_are_named_by_them(read):
    row = {"step": 1, "train/grad_norm/a/k": 3.0, "train/grad_norm/b": 4.0}
    found = read(lines(row))
    assert [*found] == ["step", "width", "norm", "nonfinite", "norm/a/k", "norm/b"]
    assert found["norm"].tolist() == [5.0]


def test_names_of_ours_mean_another_thing_in_other_logs(read):
    found = read(lines({"step": 1, "loss": 2.0, "skipped": 50, "run": 9, "width": 3}))
    assert [*found] == ["step", "width", "loss", "nonfinite"]
    assert found["width"].tolist() == [1]


def test_columns_of_several_runs_are_refused(read):
    with pytest.raises(
        ValueError, match="one run, got a column of each: a - loss, b -"
    ):
        read("Step,a - loss,b - loss\n1,2.0,2.0\n2,1.0,1.0\n")


# Evaluations.


@pytest.mark.parametrize("tag", ["mode", "split", "phase"])
def test_a_row_that_says_it_is_an_evaluation_is_left_out(read, tag):
    rows = [
        {tag: "train", "iter": 5, "loss": 1.0},
        {tag: "val", "iter": 5, "loss": 9.0},
    ]
    assert read(lines(*rows), "loss") == [[1.0]]


def test_rows_of_evaluations_are_left_out(read):
    rows = [{"step": 5, "loss": 2.0}, {"step": 5, "eval_loss": 9.0}]
    rows += [{"step": 7, "eval_loss": 9.0}, {"step": 10, "loss": 1.0}]
    text = json.dumps({"best_metric": None, "log_history": rows})
    assert read(text, "step", "loss", file="trainer_state.json") == [
        [5, 10],
        [2.0, 1.0],
    ]


def test_a_table_may_write_nan_for_what_is_missing(read):
    text = "step,loss,val_loss\n10,2.0,NaN\n10,NaN,2.1\n20,1.9,NaN\n"
    assert read(text, "step", "loss", "nonfinite") == [[10, 20], [2.0, 1.9], [0, 0]]


def test_in_such_a_table_a_norm_that_is_missing_beside_a_loss_is_not_nan(read):
    text = "step,loss,grad_norm,val_loss\n1,2,5,nan\n1,nan,nan,3\n2,1,nan,nan\n"
    assert read(text + "3,nan,nan,nan\n", "nonfinite") == [[0, 0, 1]]


def test_a_loss_that_is_nan_beside_an_evaluation_is_not_finite(read):
    text = "epoch,loss,val_loss\n0,2.0,2.1\n1,nan,nan\n2,nan,1.9\n"
    assert read(text, "nonfinite") == [[0, 1, 1]]


def test_rows_with_the_learning_rate_alone_join_those_of_the_same_step(read):
    text = (
        "step,train_loss_step,val_loss,lr-Adam\n9,2.3,,\n9,,,0.1\n19,2.2,,\n19,,2.5,\n"
    )
    step, loss, rate = read(text, "step", "loss", "learning_rate")
    assert (step, loss) == ([9, 19], [2.3, 2.2])
    same(rate, [0.1, NAN])


# Steps.


def test_a_resumed_run_replaces_what_it_did_again(read):
    text = "step,loss\n10,3\n20,2.9\n30,2.8\n20,2.5\n30,2.4\n40,2.3\n"
    assert read(text, "step", "loss") == [[10, 20, 30, 40], [3, 2.5, 2.4, 2.3]]


def test_a_step_that_goes_back_to_the_first_begins_another_run(read):
    text = "step,loss\n10,3\n20,2\n30,1\n10,3.1\n20,2.1\n"
    runs, widths = read(text, "run", "width")
    assert (runs, widths) == ([0, 0, 0, 1, 1], [10] * 5)


@pytest.mark.parametrize("starts", [(0, 0), (0, 30)])
def test_steps_that_are_counted_anew_in_each_epoch_go_on(read, starts):
    rows = [(1, starts[0], 3), (1, 50, 2.9), (1, 100, 2.8), (2, starts[1], 2.7)]
    rows += [(2, starts[1] + 50, 2.6), (3, 10, 2.5)]
    text = "epoch,iter,loss\n" + "".join(f"{a},{b},{c}\n" for a, b, c in rows)
    assert read(text, "step", "loss") == [
        [0, 50, 100, 150, 200, 250],
        [3, 2.9, 2.8, 2.7, 2.6, 2.5],
    ]


def test_a_run_after_one_with_epochs_is_another(read):
    text = "epoch,iter,loss\n1,5,3\n1,10,2\n2,5,2\n2,10,1\n1,5,3\n1,10,2\n"
    assert read(text, "run") == [[0, 0, 0, 0, 1, 1]]


def test_without_epochs_the_loss_tells_whether_a_run_goes_on(read):
    text = "iter,loss\n0,3\n1,2.5\n2,2\n0,1.9\n1,1.8\n2,1.7\n"
    assert read(text, "step") == [[0, 1, 2, 3, 4, 5]]


def test_rounded_steps_are_spread(read):
    rows = [("1K", 6), ("1K", 5), ("2K", 4), ("2K", 3), ("3K", 2), ("3K", 1)]
    text = "\n".join(f"INFO x.py:7 step:{a} loss:{b} grdn:0.5" for a, b in rows)
    assert read(text, "step", "loss") == [
        [1000, 1500, 2000, 2500, 3000, 3500],
        [6, 5, 4, 3, 2, 1],
    ]


def test_a_table_with_the_newest_row_first_is_turned(read):
    assert read("step,loss\n30,1\n20,2\n10,3\n", "step", "loss") == [
        [10, 20, 30],
        [3, 2, 1],
    ]


def test_a_row_without_a_step_is_left_out_where_others_have_one(read):
    rows = [{"step": 10, "loss": 2}, {"step": 20, "loss": 1}, {"loss": 9}]
    assert read(lines(*rows), "step", "loss") == [[10, 20], [2, 1]]


def test_rows_are_numbered_where_there_are_no_steps(read):
    assert read(lines({"loss": 2}, {"loss": 1}), "step") == [[0, 1]]


def test_a_row_is_as_wide_as_the_steps_since_the_one_before(read):
    assert read("step,loss\n0,3\n10,2\n20,1\n50,1\n", "width") == [[1, 10, 10, 30]]
    assert read("step,loss\n900,3\n910,2\n920,1\n", "width") == [[10, 10, 10]]


# Numbers.


def test_words_for_what_is_no_number_are_read_and_the_missing_is_not_finite_nowhere(
    read,
):
    text = (
        '{"loss": NaN, "norm": Infinity}\n{"loss": "-inf"}\n{"loss": null, "norm": 1}'
    )
    loss, norm, bad = read(text, "loss", "norm", "nonfinite")
    same(loss, [NAN, -INF, NAN])
    same(norm, [INF, NAN, 1])
    assert bad == [1, 1, 0]


def test_numbers_as_text_with_units_and_thousands_are_read(read):
    rows = [{"step": "1,500", "loss": "2.5e0"}, {"step": "2.5K", "loss": " 2 "}]
    assert read(lines(*rows), "step", "loss") == [[1500, 2500], [2.5, 2.0]]


def test_a_decimal_comma_is_a_point_where_it_can_be_nothing_else(read):
    text = "step;loss;norm\n1;2,35;0,5\n2;2,355;0,4\n"
    assert read(text, "loss", "norm") == [[2.35, 2.355], [0.5, 0.4]]


@pytest.mark.parametrize("row", ["1;2,355;7", "1;2,35;0.5", "1;1.002,35;7"])
def test_a_comma_that_may_be_either_is_refused(read, row):
    with pytest.raises(ValueError, match=r"decimal points or decimal commas .* either"):
        read(f"step;loss;norm\n{row}\n")


# Files.


def test_printed_mappings_are_read_among_other_lines(read):
    text = """Loading
    {'loss': np.float32(2.1), 'grad_norm': nan, 'epoch': 0.1}
     10%|#  | 1/2 [00:01]\r{'loss': '2.0', 'grad_norm': Array(1.5, dtype=float32)}
    {'eval_loss': 2.0, 'epoch': 0.2}
    {'train_runtime': 5.0, 'train_loss': 1.9, 'epoch': 1.0}
    {'los"""
    loss, norm, bad = read(text, "loss", "norm", "nonfinite")
    assert (loss, bad) == ([2.1, 2.0], [1, 0])
    same(norm, [NAN, 1.5])


def test_mappings_after_a_time_are_read(read):
    row = {"epoch": 1, "loss": "15.1", "gnorm": "3.2", "num_updates": "100"}
    text = f"2021 | INFO | inner | {json.dumps(row)}\n2021 | INFO | valid | "
    text += json.dumps({"valid_loss": "9.0", "valid_num_updates": "100"})
    assert read(text, "step", "loss", "norm") == [[100], [15.1], [3.2]]


@pytest.mark.parametrize(
    "line",
    [
        "Step {} | loss:{} grad_norm:{} lr:2e-05",
        "iter {}: loss {}, grad norm {}, time 10ms",
        " iteration   {}/ 500 | lr: 1E-05 | lm loss: {} | grad norm: {} | scale: 1.0 |",
        "step={} loss={} (9.0) gnorm={}",
    ],
)
def test_lines_of_names_and_numbers_are_read_but_for_evaluations(read, line):
    rows = [line.format(10, "2.50E+00", 1.5), "validation | step 10 | loss: 9.0"]
    text = "\n".join([*rows, "saved at step 10", line.format(20, "nan", "inf")])
    step, loss, norm = read(text, "step", "loss", "norm")
    assert step == [10, 20]
    same([loss, norm], [[2.5, NAN], [1.5, INF]])


def test_marks_at_the_start_of_a_file_and_of_lines_don_t_matter(read):
    text = "\ufeff# by me, today\r\n,step,loss,done\r\n"
    text += "0,1,2.0,True\r\n1,2,1.0,\r\n\r\n# x\r\n"
    assert read(text, "step", "loss") == [[1, 2], [2.0, 1.0]]
    assert read("# run\n# step,loss\n1,2.0\n2,1.0\n", "loss") == [[2.0, 1.0]]


def test_names_that_are_written_again_count_from_there_on(read):
    text = "step,loss,norm\n1,2,0.5\n2,1,0.5\nstep,norm,loss\n3,0.4,0.9\n"
    assert read(text, "loss", "norm") == [[2, 1, 0.9], [0.5, 0.5, 0.4]]


def test_a_torn_last_line_is_left_out(read):
    assert read("step,loss,norm\n1,2,0.25\n2,1,0.25\n3,0.", "step") == [[1, 2]]
    assert read('{"loss": 2}\n{"loss": 1}\n{"lo', "loss", file="a.jsonl") == [[2, 1]]


def test_columns_in_json_and_one_row_are_read(read):
    text = '{"loss": [2, null], "norm": [1, 2], "name": ["a", "b"]}'
    same(read(text, "loss")[0], [2, NAN])
    assert read('{"step": 3, "loss": 1.0}', "step", file="a.jsonl") == [[3]]
    assert read('[{"loss": 2},\n {"loss": 1}]', "loss") == [[2, 1]]


@pytest.mark.parametrize(
    "table",
    [
        {"loss": {"0": 2, "1": 1}, "grad_norm": {"0": 3, "1": None}},
        {"0": {"loss": 2, "grad_norm": 3}, "1": {"loss": 1, "grad_norm": None}},
    ],
)
def test_what_pandas_writes_by_column_or_by_row_is_read(read, table):
    loss, norm = read(json.dumps(table), "loss", "norm")
    assert loss == [2, 1]
    same(norm, [3, NAN])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"first line with the names of columns .* got \[\]"),
        ("step,loss\n", "first line with the names"),
        ("1,2.0\n2,1.0\n", r"first line with the names .* got \['1,2.0'\]"),
        ("step,loss\n1,2,35\n2,2,30\n", "Expected 2 numbers in each line .* got 3"),
        ("loss,loss\n1,2\n2,2\n", "different names .* got 'loss' twice"),
        ("step,loss\nx,y\n", "Expected rows with numbers .* found none"),
        ('{"loss": ', "Expected JSON in .* got none"),
        ('{"loss": \n{"loss": \n{"loss"\n', "a mapping in each line .* got 0 in 3"),
        ("[[1, 2]]", r"a list of mappings .* got '\[\[1, 2\]\]'"),
        ('{"loss": [1], "norm": [1, 2]}', "columns of one length .* got {'loss': 1"),
    ],
)
def test_what_is_no_log_says_what_is_wrong(read, text, message):
    with pytest.raises(ValueError, match=message):
        read(text)


def test_other_encodings_and_other_files_are_refused(read, tmp_path):
    with pytest.raises(ValueError, match="which is no text in UTF-8"):
        read("step,loss\n1,2\n", encoding="utf-16")
    with pytest.raises(ValueError, match=r"Expected arrays in .*run\.npz, got none"):
        read("step,loss\n1,2\n", file="run.npz")
    with pytest.raises(ValueError, match="where nothing is"):
        optaxclip.history(tmp_path / "nowhere.csv")


def test_without_the_reader_of_event_files_its_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing", None)
    with pytest.raises(ValueError, match="Expected the package `tensorboard`, to read"):
        optaxclip.history(tmp_path)
