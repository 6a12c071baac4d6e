"""Each verdict on where a run goes is given where it is due, and not right beside."""

import numpy as np
import pytest

from made_up import flat, healthy, noisy
from optaxclip import diagnose
from optaxclip._advice.diagnose import BAD


def bad(history):
    return [name for name in diagnose(history) if name in BAD]


# diverged


def test_a_loss_that_rose_and_stays_up_diverged():
    history = healthy()
    history["loss"][120:] = flat(4.0, 80)
    verdicts = diagnose(history)
    assert list(verdicts) == ["diverged"]
    text = verdicts["diverged"]
    assert "DIVERGED: the loss was 1.32 near step 107" in text
    assert "is 3.99 at the end, step 199; it began at 4.62." in text
    assert "go back to a checkpoint from step 107 or before" in text
    assert " The gradient norm was 2" in text


def running_away(norms):
    """A loss that grows twenty orders of magnitude, in swings as large as itself."""
    rows = np.arange(300)
    swings = np.exp(2 * np.sin(rows / 3)) * noisy(1.0, 300, 1.0, 0)
    return {"loss": np.exp(rows / 7) * swings, "norm": np.exp(norms * rows) * swings}


def test_a_loss_that_runs_away_in_swings_diverged():
    assert "diverged" in bad(running_away(norms=1 / 14))


def test_a_loss_that_rises_while_its_norms_do_not_may_be_meant():
    assert "diverged" not in bad(running_away(norms=0.0))


def test_a_loss_that_rose_and_came_back_did_not_diverge():
    history = healthy()
    history["loss"][120:150] = flat(4.0, 30)
    assert "diverged" not in diagnose(history)


def test_a_loss_that_creeps_up_diverged_if_the_norms_do_too():
    history = healthy(2000)
    history["loss"][1000:] *= np.linspace(1, 1.5, 1000)
    assert bad(history) == []  # other data do that
    history["norm"][1000:] *= np.linspace(1, 5, 1000)
    assert bad(history) == ["diverged"]


def test_a_loss_that_begins_near_zero_by_construction_may_rise():
    rise = np.linspace(0.001, 0.1, 200)
    history = healthy() | {"loss": noisy(rise, 200, 0.1, 3)}
    assert bad(history) == []
    history["norm"] = history["norm"] * np.geomspace(1, 8, 200)
    assert bad(history) == ["diverged"]


def test_a_loss_that_diverged_from_the_first_rows_begins_anew():
    history = healthy()
    history["loss"][6:] = flat(30.0, 194)
    assert "begin anew with a lower learning rate" in diagnose(history)["diverged"]


def test_a_huge_loss_in_an_excerpt_seems_to_have_diverged():
    history = healthy(20, every=10)
    history["step"] += 5000
    history["loss"] = noisy(4e8, 20, 0.5, 1)
    assert bad(history) == ["diverged"]
    text = diagnose(history)["diverged"]
    assert "DIVERGED, it seems: the log begins at step 5000" in text
    assert "There is no healthy row to compare with" in text
    history["loss"] = noisy(4e8, 20, 0.01, 1)  # a sum over very many
    assert bad(history) == []


def test_a_loss_that_rose_threefold_in_an_excerpt_diverged_with_its_norms():
    loss = np.array([0.9, 1.0, 2.2, 5.1, 5.8, 6.0])
    history = {"loss": loss, "norm": np.array([1.1, 1.5, 23.0, 60.0, 41.0, 12.0])}
    assert bad(history)[0] == "diverged"
    text = diagnose(history)["diverged"]
    assert "the loss was 1 at step 1 and is 5.8 in the last rows." in text
    assert "norm was 1.3 then, and 60 at its highest since" in text
    step = 100 + np.arange(6)
    for others in {}, {"norm": np.ones(6)}:
        verdicts = diagnose({"step": step, "loss": loss} | others)
        assert list(verdicts) == ["too_short"]
    assert list(diagnose({"step": step, "loss": loss**3})) == ["diverged"]


# growing


def test_norms_that_grow_while_the_loss_is_flat_are_growing():
    history = healthy() | {"loss": flat(2.0, 200)}
    history["loss"][:5] = 6.0
    history["norm"] *= np.geomspace(1, 100, 200)
    assert bad(history) == ["growing"]
    text = diagnose(history)["growing"]
    assert "the gradient norm rose from 10.9 near step 50 to 158 at step 199" in text
    assert "while the loss, 1.9" in text and "often ends in an explosion: clip" in text


def test_norms_that_grow_while_the_loss_falls_are_healthy():
    history = healthy()
    history["loss"] = noisy(np.geomspace(5, 0.5, 200), 200, 0.02, 1)
    history["norm"] *= np.geomspace(1, 100, 200)
    assert bad(history) == []


def test_norms_that_grow_fivefold_are_healthy():
    history = healthy() | {"loss": flat(2.0, 200)}
    history["loss"][:5] = 6.0
    history["norm"] *= np.geomspace(1, 5, 200)
    assert bad(history) == []


def test_a_loss_that_turned_up_with_growing_norms_is_growing_in_a_few_rows():
    loss = np.array([1.4, 1.1, 0.8, 0.6, 0.5, 0.5, 0.5, 0.55, 0.62, 0.8, 0.9])
    norm = np.array([0.3, 0.3, 0.33, 0.4, 0.6, 0.9, 1.3, 2.5, 6.0, 12.0, 23.0])
    assert bad({"loss": loss, "norm": norm}) == ["growing"]
    assert bad({"loss": np.sort(loss)[::-1], "norm": norm}) == []


def test_a_loss_without_a_lower_end_is_named():
    time = np.arange(40)
    history = {"loss": -np.exp(time / 9), "norm": 6 * np.exp(time / 6)}
    assert "The loss has no lower end" in diagnose(history)["growing"]


def test_norms_that_grow_faster_and_faster_are_told_in_six_rows():
    norm = np.array([2.57, 2.58, 2.58, 2.64, 2.80, 3.43])
    text = diagnose({"norm": norm})["growing"]
    assert "faster and faster: the gradient norm rose from 2.58 to 3.43" in text
    assert bad({"norm": norm[[0, 4, 1, 3, 2, 5]]}) == []


# no_traction


def test_a_flat_loss_has_no_traction():
    history = healthy() | {"loss": flat(2.303, 200)}
    assert bad(history) == ["no_traction"]
    text = diagnose(history)["no_traction"]
    assert (
        "the loss is 2.3 from step 0 to 199; if it fell, then by less than 1 %" in text
    )
    assert "There are gradients: their norm is 2. Look at the" in text


@pytest.mark.parametrize("fall", ["slowly", "at once"])
def test_a_loss_that_fell_slowly_or_at_once_has_traction(fall):
    loss = flat(2.303, 200)
    loss *= np.linspace(1.1, 0.9, 200) if fall == "slowly" else 1
    loss[:1] *= 1.5 if fall == "at once" else 1
    assert bad(healthy() | {"loss": loss}) == []


def test_a_loss_that_only_jumped_at_first_has_no_traction():
    loss = flat(2.303, 200, scale=0.001)
    loss[3:6] = 5.0
    assert "no_traction" in diagnose(healthy() | {"loss": loss})


def test_a_flat_loss_in_an_excerpt_is_no_lack_of_traction():
    history = healthy() | {"loss": flat(2.303, 200), "step": 5000 + np.arange(200)}
    assert bad(history) == []


def test_a_flat_loss_too_noisy_to_tell_is_no_lack_of_traction():
    assert bad(healthy(40) | {"loss": flat(2.303, 40, scale=0.5)}) == []


# oscillating


def test_a_loss_that_never_came_back_to_its_start_is_too_fast():
    history = healthy(8)
    history["loss"] = np.array([1.24, 1.6, 2.03, 2.16, 2.1, 1.9, 1.82, 1.79])
    text = diagnose(history)["oscillating"]
    assert "the loss began at 1.24, rose to 2.16 and never came back" in text
    history["loss"][-1] = 1.3
    assert bad(history) == []


def test_a_loss_that_jumped_from_its_start_with_the_norms_is_too_fast():
    history = healthy()
    history["loss"] = np.append(2.0, noisy(60.0, 199, 0.2, 1))
    history["norm"][0] = 0.3
    assert bad(history) == ["oscillating"]
    history["norm"][0] = 2.0  # an objective that is near zero at first
    assert bad(history) == []


def test_a_loss_that_swings_threefold_with_the_norms_oscillates():
    swing = np.exp(1.3 * np.sin(np.arange(200) / 9))
    history = healthy() | {"loss": 2 * swing * noisy(1, 200, 0.05, 1)}
    assert bad(history) == []  # the norms say nothing
    history["norm"] *= swing**2
    text = diagnose(history)["oscillating"]
    assert "4 times the loss rose threefold or more, above the 2.03" in text
    assert "the peaks are at steps" in text


def test_a_loss_of_two_kinds_of_batches_does_not_swing():
    kinds = np.where(np.random.default_rng(0).random(200) < 0.4, 3.0, 0.5)
    history = healthy()
    loss = history["loss"] * kinds
    assert bad(history | {"loss": loss, "norm": history["norm"] * kinds**2}) == []


def test_a_loss_that_jumps_up_and_down_oscillates():
    history = healthy()
    history["loss"] = history["loss"] + 0.6 * (-1.0) ** np.arange(200)
    text = diagnose(history)["oscillating"]
    assert "jumps up and down from row to row, by about 1.19 around 1.6" in text
    assert "Unless the data alternate so" in text
    assert bad(healthy() | {"loss": noisy(1.3, 200, 0.4, 2)}) == []


# spikes


def spiky(rows=400, width=1):
    history = healthy(rows)
    history["norm"][250] *= 40
    history["loss"][250 : 250 + width] += 2.0
    return history


def test_a_spike_that_the_loss_followed_is_told_with_its_step():
    assert bad(spiky()) == ["spikes"]
    text = diagnose(spiky())["spikes"]
    assert "SPIKES at step 250: the gradient norm was up to 3" in text
    assert "The loss came back." in text
    assert "the 90th percentile of the norms before it, would have cut it" in text
    assert "`skip_if_spike` leaves such steps out." in text


def test_a_spike_at_the_end_may_not_have_recovered():
    history = {key: column[:253] for key, column in spiky(width=3).items()}
    assert "too early to say whether the run recovers" in diagnose(history)["spikes"]


def test_a_spike_after_which_the_loss_stays_up_has_not_come_back():
    history = healthy(400)
    history["norm"][250] *= 40
    history["loss"][250:] += 0.5
    history["loss"][250] += 2
    assert "The loss has not come back." in diagnose(history)["spikes"]


def test_a_loss_far_from_the_spike_does_not_follow_it():
    history = spiky()
    history["norm"] = np.roll(history["norm"], 40)
    assert bad(history) == []


def test_losses_that_follow_as_often_as_by_chance_are_no_spikes():
    history = healthy(2000)
    rng = np.random.default_rng(0)
    history["norm"][rng.choice(2000, 40)] *= 50
    history["loss"][rng.choice(2000, 40)] += 2.0
    assert bad(history) == []


def test_without_norms_a_loss_that_spikes_for_three_rows_is_told():
    history = spiky(width=4)
    del history["norm"]
    text = diagnose(history)["spikes"]
    assert "SPIKES at step 250: the loss was far above its neighbours" in text
    history = spiky(width=1)  # an average of few batches, mostly
    del history["norm"]
    assert bad(history) == []


def test_the_peaks_of_a_stretch_count():
    history = healthy(256) | {
        "width": np.full(256, 16),
        "nonfinite": np.zeros(256, int),
    }
    history["peak/norm"], history["peak/loss"] = (
        history["norm"] * 1.4,
        history["loss"] * 1,
    )
    assert bad(history) == []
    history["peak/norm"][150] *= 40
    history["peak/loss"][150] *= 2
    assert bad(history) == ["spikes"]
