"""Which layers are dead, starved, to blame: only those that are, by name."""

import jax
import jax.numpy as jnp
import numpy as np

from made_up import LEAVES, NAN, by_leaf, clipped, flat, healthy
from optaxclip import diagnose
from optaxclip._advice.diagnose import BAD

WEIGHTS = {
    f"Dense_{i}": {"bias": jnp.full(64, 0.1), "kernel": jnp.full((64, 64), 0.1)}
    for i in range(4)
}
SHAPES = jax.eval_shape(lambda: WEIGHTS)
BLOCKS = [f"blocks/{i}/kernel" for i in range(8)]


def bad(history, params=None):
    return [name for name in diagnose(history, params) if name in BAD]


def with_norms(history, leaves, rows, values):
    for leaf in leaves:
        history[f"norm/{leaf}"][rows] = values
    return history


# dead


def test_layers_that_are_cut_off_are_named_up_to_the_last_one():
    gone = [x for x in LEAVES if x not in ("Dense_3/bias", "Dense_2/bias")]
    gone.remove("Dense_3/kernel")
    history = with_norms(by_leaf(), gone, slice(None), 0.0)
    assert bad(history) == ["dead"]
    assert (
        "DEAD since step 0: everything up to Dense_2/kernel is cut off (gradient"
        " exactly 0); the first leaf that lives is Dense_2/bias: look at what feeds it."
    ) in diagnose(history)["dead"]


def test_a_dead_member_of_a_stack_is_named():
    history = with_norms(by_leaf(leaves=BLOCKS), BLOCKS[:3], slice(None), 0.0)
    text = diagnose(history)["dead"]
    assert "everything up to blocks/2/kernel" in text
    assert "lives is blocks/3/kernel" in text


def test_a_leaf_that_died_in_the_last_steps_of_a_record_is_dead():
    """In most of its rows, but in less than a quarter of the steps."""
    history = by_leaf(rows=160)
    history = with_norms(history, ["Dense_0/kernel"], slice(-80, None), 0.0)
    width = np.repeat([4, 1], [60, 100])
    step = np.cumsum(width) - width
    history |= {"step": step, "width": width, "nonfinite": 0 * width}
    history["peak/loss"] = history["loss"]
    assert "dead" in bad(history)
    assert f"DEAD since step {step[80]}" in diagnose(history)["dead"]


def test_layers_without_an_order_are_only_listed():
    names = ["decoder/kernel", "encoder/kernel", "head/kernel", "trunk/kernel"]
    history = with_norms(by_leaf(leaves=names), names[:2], slice(50, None), 0.0)
    assert (
        "DEAD since step 50: the gradient of decoder/kernel, encoder/kernel (2 of 4"
        " leaves) is exactly 0. Unless frozen, they learn nothing any more."
    ) in diagnose(history)["dead"]


def test_a_layer_in_the_middle_does_not_cut_off_those_before_it():
    history = with_norms(by_leaf(), ["Dense_1/kernel"], slice(None), 0.0)
    text = diagnose(history)["dead"]
    assert "the gradient of Dense_1/kernel (1 of 8 leaves) is exactly 0" in text
    assert "it learns nothing" in text and "cut off" not in text


def test_a_gradient_that_is_zero_now_and_then_is_not_dead():
    rows = np.random.default_rng(0).random(200) < 0.6  # an expert, seldom asked
    rows[-1] = False
    assert bad(with_norms(by_leaf(), ["Dense_1/kernel"], rows, 0.0)) == []


def test_a_leaf_that_died_after_large_clipped_steps_is_finite_but_dead():
    history = with_norms(by_leaf(), LEAVES[:4], slice(120, None), 0.0)
    history |= clipped(np.full(200, 800.0), 420.0)
    text = diagnose(history)["dead"]
    assert text.startswith("DEAD since step 120: everything up to Dense_1/bias is cut")
    assert "The threshold 420 kept the run finite, not healthy" in text
    assert "Begin anew with a tenth of it." in text
    history |= clipped(np.full(200, 4.0), 420.0)
    assert "The threshold" not in diagnose(history)["dead"]


def test_all_gradients_zero_from_a_step_on_are_dead():
    history = healthy() | {"loss": np.append(healthy()["loss"][:150], flat(2.3, 50))}
    history["norm"][150:] = 0.0
    text = diagnose(history)["dead"]
    assert (
        "DEAD since step 150: the gradient norm was 1.59 before and is exactly 0"
        in (text)
    )
    assert "in 50 rows, and the loss stays at about 2.29." in text


def test_all_gradients_zero_beside_a_loss_that_falls_are_not_printed():
    assert bad(healthy() | {"norm": np.zeros(200)}) == []
    flat_loss = healthy() | {"norm": np.zeros(200), "loss": flat(2.3, 200)}
    assert bad(flat_loss) == ["dead", "no_traction"]
    assert "exactly 0 in 200 of 200 rows" in diagnose(flat_loss)["dead"]


def test_gradients_that_faded_to_zero_have_learnt_all():
    fade = np.round(np.geomspace(2, 1e-8, 200), 5)
    assert bad({"loss": fade + 1e-4, "norm": fade}) == []


def test_gradients_here_and_there_are_told():
    norm = np.where(np.arange(20) % 5 == 2, 4.0, 0.0)
    text = diagnose({"loss": np.zeros(20), "norm": norm})["dead"]
    assert "exactly 0 in 16 of 20 rows, and the loss exactly 0" in text
    norm, loss = np.array([0, 0, 404.0, 0, 0]), np.array([0.05, 0, 0, 0, 0])
    assert bad({"loss": loss, "norm": norm}) == ["dead"]
    norm = np.where(np.arange(20) % 5 == 2, 0.0, 4.0)
    assert bad({"loss": np.zeros(20), "norm": norm}) == []


def test_a_loss_of_zero_without_norms_is_no_signal():
    history = {"loss": np.append([0.01, 0.004], np.zeros(18))}
    assert "exactly 0 in the last 18 rows" in diagnose(history)["dead"]
    history["norm"] = np.full(20, 0.1)  # some objectives are zero by construction
    assert bad(history) == []


# vanishing


def fading(factor, leaves=LEAVES, layers=4):
    history = by_leaf(leaves=leaves)
    for i, leaf in enumerate(leaves):
        history[f"norm/{leaf}"] *= factor ** (layers - 1 - i * layers // len(leaves))
    return history


def test_gradients_that_fall_from_layer_to_layer_vanish():
    for params in WEIGHTS, SHAPES:
        assert bad(fading(0.01), params) == ["vanishing"]
    text = diagnose(fading(0.01), SHAPES)["vanishing"]
    assert "the gradient of Dense_0/kernel has a root mean square of 1.58" in text
    assert "e-8, that of Dense_3/kernel one of 0.0152" in text
    assert "No clip lifts a small gradient" in text


def test_gradients_that_vanished_before_the_last_layers_gave_up_did_vanish():
    history = fading(0.01) | {"loss": flat(1.37, 200)}
    for leaf in LEAVES:
        history[f"norm/{leaf}"][20:] = 1e-6
    assert bad(history, SHAPES) == ["vanishing", "no_traction"]
    history["loss"] = healthy()["loss"]  # and that was only the start
    assert bad(history, SHAPES) == []


def test_gradients_that_fall_a_little_do_not_vanish():
    assert bad(fading(0.2), SHAPES) == []


def test_without_params_or_an_order_nothing_vanishes():
    assert bad(fading(0.01)) == []
    names = ["a/kernel", "b/kernel", "c/kernel", "d/kernel"]
    shapes = {x[0]: {"kernel": jax.ShapeDtypeStruct((4, 4), "float32")} for x in names}
    assert bad(fading(0.01, names), shapes) == []


def test_gradients_vanish_in_a_stack():
    shapes = {"blocks": {"kernel": jax.ShapeDtypeStruct((8, 4, 4), "float32")}}
    history = fading(0.1, BLOCKS, layers=8)
    assert "blocks/0/kernel" in diagnose(history, shapes)["vanishing"]


# Who is to blame


def test_the_leaf_that_was_nan_first_is_named():
    history = with_norms(by_leaf(), LEAVES, slice(151, None), NAN)
    history["loss"][151:] = NAN
    text = diagnose(with_norms(history, ["Dense_2/kernel"], 150, NAN))["not_finite"]
    assert (
        "at step 150, in Dense_2/kernel (1 of 8 leaves), the others finite; the norm"
        in text
    )


def test_all_leaves_at_once_name_none():
    history = with_norms(by_leaf(), LEAVES, slice(150, None), NAN)
    history["loss"][150:] = NAN
    assert "at step 150, every leaf at once; the" in diagnose(history)["not_finite"]


def exploding(leaves):
    history = by_leaf()
    for i in range(8):
        for leaf in leaves:
            history[f"norm/{leaf}"][142 + i] *= 4.0 ** (i + 1)
    history["loss"][150:] = NAN
    return with_norms(history, LEAVES, slice(150, None), NAN)


def test_the_only_leaf_that_exploded_is_named():
    text = diagnose(exploding(["Dense_0/kernel"]))["exploded"]
    assert text.startswith("EXPLODED at step 150 (Dense_0/kernel alone). The gradient")


def test_leaves_that_exploded_together_are_not_named():
    text = diagnose(exploding(LEAVES))["exploded"]
    assert text.startswith("EXPLODED at step 150 (every leaf). The gradient")


def test_a_leaf_is_not_named_alone_where_another_grew_less():
    history = exploding(["Dense_0/kernel"])
    history["norm/Dense_1/bias"][147:150] *= 6
    text = diagnose(history)["exploded"]
    assert "EXPLODED at step 150, every leaf at once. The" in text


# Weights


def test_weights_that_are_nan_are_named():
    broken = WEIGHTS | {"Dense_1": {"kernel": jnp.array([[1.0, NAN]])}}
    verdicts = diagnose(healthy(), broken)
    assert list(verdicts) == ["not_finite"]
    assert "NOT FINITE WEIGHTS, in Dense_1/kernel. No step" in verdicts["not_finite"]


def test_huge_weights_are_named_with_their_size():
    huge = WEIGHTS | {"Dense_1": {"kernel": jnp.full((4, 4), 3e4), "steps": 10**6}}
    verdicts = diagnose(healthy(), huge)
    assert list(verdicts) == ["growing"]
    assert (
        "those of Dense_1/kernel have a root mean square of 3e4."
        in (verdicts["growing"])
    )


def test_usual_weights_their_shapes_and_half_precision_say_nothing():
    half = jax.tree.map(lambda x: (100 * x).astype(jnp.bfloat16), WEIGHTS)
    for params in WEIGHTS, SHAPES, half:
        assert list(diagnose(healthy(), params)) == ["healthy"]


def test_a_run_that_is_nan_is_told_before_its_weights():
    history = healthy()
    history["loss"][150:] = history["norm"][150:] = NAN
    text = diagnose(history, {"w": jnp.array([NAN])})["not_finite"]
    assert "NOT FINITE at step 150" in text
