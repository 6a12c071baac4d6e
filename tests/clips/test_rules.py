"""The rules by name, each against a float64 loop from its paper's equations."""

import jax
import numpy as np
import pytest

from helpers import oc
from rule_references import (
    RULES,
    clip_of,
    columns_of_leaves,
    counts,
    is_real,
    lively,
    np_aggc,
    np_autoclip,
    np_k_sigma_decay,
    np_k_sigma_window,
    np_zclip,
    stepped,
)

pytestmark = pytest.mark.usefixtures("strict_shapes")


# --------------------------------------------------------------------------------------
# The references: the thresholds for a history of norms
# --------------------------------------------------------------------------------------


def np_adagc(columns, relative=1.05, decay=0.98, warmup_steps=100, max_norm=1.0):
    """Every column is a leaf; in the warm-up all are clipped by their common norm."""
    columns = np.asarray(columns, np.float64)
    leaves = columns.shape[1]
    average, seen, allowed = [None] * leaves, [0] * leaves, []
    for row in columns:
        finite = np.where(np.isfinite(row), row, 0)
        total = np.sqrt(np.sum(finite**2))
        limits = []
        for i, norm in enumerate(row):
            if not counts(norm):
                limits.append(np.nan)
                continue
            if seen[i] < warmup_steps:
                clipped = norm * min(1, max_norm / total)
                limit = clipped if total > max_norm else np.inf
                average[i] = clipped if average[i] is None else min(average[i], clipped)
            elif average[i] is None:
                limit, average[i] = np.inf, norm
            else:
                limit = relative * average[i]
                clipped = min(norm, limit)
                average[i] = decay * average[i] + (1 - decay) * clipped
            seen[i] += 1
            limits.append(limit)
        allowed.append(limits)
    return allowed


def np_stable_spam(grads, mean_decay=0.7, rms_decay=0.9, max_decay=0.999):
    """Of one leaf: AdaClip on its elements, then AdaGN on its norm."""
    top = mean = square = 0.0
    t, out = 0, []
    for g in np.asarray(grads, np.float64):
        largest = np.max(np.abs(g))
        if not counts(largest):
            out.append(g * np.where(np.isfinite(largest), 1, np.nan))
            continue
        t += 1
        top = max_decay * top + (1 - max_decay) * largest
        bound = top / (1 - max_decay**t)
        g = np.where(np.abs(g) > bound, g / largest * bound, g)
        norm = np.sqrt(np.sum(g**2))
        mean = mean_decay * mean + (1 - mean_decay) * norm
        square = rms_decay * square + (1 - rms_decay) * norm**2
        unbiased = square / (1 - rms_decay**t)
        out.append(g / norm * (mean / (1 - mean_decay**t)) / np.sqrt(unbiased))
    return np.array(out)


# --------------------------------------------------------------------------------------
# The histories
# --------------------------------------------------------------------------------------


def late_start(steps=300):
    """Zeros first, as of LoRA's first matrix, then constant norms and a shift."""
    rest = np.where(np.arange(steps - 40) < 180, 0.25, 4.0)
    return np.concatenate([np.zeros(40), rest]).astype(np.float32)


HISTORIES = {"lively": lively(), "another": lively(1), "late_start": late_start()}
every_history = pytest.mark.parametrize("history", HISTORIES)


@every_history
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_its_reference_over_the_whole_history(rule, history):
    _, reference, arguments = RULES[rule]
    sizes = HISTORIES[history]
    ours, after = stepped(clip_of(rule), sizes)
    real = np.isfinite(sizes) & (sizes > 0)
    right = np.array(reference(sizes.astype(np.float64), *arguments))
    np.testing.assert_allclose(ours.ravel()[real], right[real], rtol=1e-5)
    held = np.where(
        np.isinf(right), sizes, right if rule == "aggc" else np.minimum(sizes, right)
    )
    np.testing.assert_allclose(after.ravel()[real], held[real], rtol=1e-5)
    assert np.all(after.ravel()[sizes == 0] == 0)
    assert np.all(np.isnan(after.ravel()[~np.isfinite(sizes)]))


def test_adagc_is_its_reference_over_the_whole_history():
    sizes = columns_of_leaves()
    ours, after = stepped(oc.adagc(), sizes)
    real, right = is_real(sizes), np.array(np_adagc(sizes))
    np.testing.assert_allclose(ours[real], right[real], rtol=1e-5)
    held = np.minimum(sizes, right)
    np.testing.assert_allclose(after[real], held[real], rtol=1e-5)


def test_without_a_warm_up_adagc_starts_from_the_first_norm():
    sizes = columns_of_leaves(200)
    ours, after = stepped(oc.adagc(warmup_steps=0), sizes)
    real, right = is_real(sizes), np.array(np_adagc(sizes, warmup_steps=0))
    np.testing.assert_allclose(ours[real], right[real], rtol=1e-5)
    assert np.all(np.isfinite(after[real]))


@pytest.mark.parametrize("decays", [(0.7, 0.9, 0.999), (0.0, 0.5, 0.9)], ids=str)
def test_stable_spam_clip_is_its_reference_over_the_whole_history(decays):
    rng = np.random.default_rng(5)
    grads = rng.normal(size=(5000, 6)) * np.nan_to_num(lively(6), posinf=1)[:, None]
    grads[rng.random(grads.shape) < 0.01] *= 1000
    grads[rng.random(5000) < 0.02, 2] = np.nan
    grads[rng.random(5000) < 0.02, 3] = np.inf
    grads[1000:1010] = 0
    grads = grads.astype(np.float32)
    clip = oc.stable_spam_clip(*decays)

    def step(state, updates):
        updates, state = clip.update(updates, state)
        return state, updates

    _, ours = jax.jit(lambda g: jax.lax.scan(step, clip.init(g[0]), g))(grads)
    np.testing.assert_allclose(ours, np_stable_spam(grads, *decays), rtol=1e-5)


# --------------------------------------------------------------------------------------
# A reference that could not tell one constant from another would prove nothing
# --------------------------------------------------------------------------------------


CHANGED = [
    (np_autoclip, (30.0, 50), 0, 31.0),
    (np_autoclip, (30.0, 50), 1, 49),
    (np_zclip, (2.5, 0.97, 25, np.inf), 0, 2.501),
    (np_zclip, (2.5, 0.97, 25, np.inf), 1, 0.9701),
    (np_zclip, (2.5, 0.97, 25, np.inf), 2, 26),
    (np_zclip, (2.5, 0.97, 25, 1.0), 3, 1.001),
    (np_k_sigma_window, (3.0, 128, 64), 0, 3.001),
    (np_k_sigma_window, (3.0, 128, 64), 1, 127),
    (np_k_sigma_window, (3.0, 128, 64), 2, 65),
    (np_k_sigma_decay, (3.0, 0.99, 64), 0, 3.001),
    (np_k_sigma_decay, (3.0, 0.99, 64), 1, 0.9901),
    (np_k_sigma_decay, (3.0, 0.99, 64), 2, 65),
    (np_aggc, (1.5, 0.5, 0.98), 0, 1.501),
    (np_aggc, (1.5, 0.5, 0.98), 1, 0.501),
    (np_aggc, (1.5, 0.5, 0.98), 2, 0.9801),
    (np_adagc, (1.05, 0.98, 100, 1.0), 0, 1.0501),
    (np_adagc, (1.05, 0.98, 100, 1.0), 1, 0.9801),
    (np_adagc, (1.05, 0.98, 100, 1.0), 2, 101),
    (np_adagc, (1.05, 0.98, 100, 1.0), 3, 1.001),
    (np_stable_spam, (0.7, 0.9, 0.999), 0, 0.701),
    (np_stable_spam, (0.7, 0.9, 0.999), 1, 0.901),
    (np_stable_spam, (0.7, 0.9, 0.999), 2, 0.9991),
]


@pytest.mark.parametrize(("reference", "arguments", "place", "value"), CHANGED)
def test_a_reference_tells_one_constant_from_another(
    reference, arguments, place, value
):
    sizes = lively(steps=500).astype(np.float64)
    if reference is np_adagc:
        sizes = columns_of_leaves(500)
    if reference is np_stable_spam:
        sizes = np.random.default_rng(0).normal(size=(500, 6))
    changed = list(arguments)
    changed[place] = value
    right, wrong = (np.array(reference(sizes, *a)) for a in (arguments, changed))
    assert not np.allclose(right, wrong, rtol=1e-5, equal_nan=True)
