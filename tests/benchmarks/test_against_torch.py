"""Both libraries are held to a clip in float64, and ours runs without the other."""

import importlib.util
import os
import types

import jax
import numpy as np
import pytest


@pytest.fixture
def against(script):
    return script("against_torch")


GRADS = {  # of norm 0.5
    "a": np.array([0.3, -0.004], np.float32),
    "b": np.array([[0.4]], np.float32),
}


def test_the_clip_in_float64_is_the_one_by_hand(against):
    norm = against.in_float64("global_norm", GRADS)
    np.testing.assert_allclose(norm["b"], [[0.08]], rtol=1e-4)  # 0.4 x 0.1 / 0.5
    value = against.in_float64("value", GRADS)
    np.testing.assert_allclose(value["a"], [0.01, -0.004], rtol=1e-7)
    np.testing.assert_array_equal(against.in_float64("none", GRADS)["a"], GRADS["a"])


@pytest.mark.parametrize(
    ("name", "work"),
    [("global_norm", "clip alone"), ("global_norm", "step"), ("value", "clip alone")],
)
def test_ours_clips_once_before_it_is_timed(against, name, work):
    grads = jax.tree.map(jax.numpy.asarray, GRADS)
    run, clipped = against.ours(name, work, grads, grads)
    run(2)
    exact = against.in_float64(name, GRADS)
    for leaf, want in zip(clipped.values(), exact.values(), strict=True):
        np.testing.assert_allclose(leaf, want, rtol=1e-6)


def test_without_torch_it_says_how_to_get_it(against, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert against.find_torch() is None
    assert "no row kept" in (printed := capsys.readouterr().out)
    assert f"pip install torch=={against.VERSION}" in printed


@pytest.mark.parametrize(("threads", "cores"), [(2, [{4, 5}]), (4, [])])
def test_fewer_threads_are_as_many_cores(against, monkeypatch, threads, cores):
    asked, told = [], []
    torch = types.SimpleNamespace(set_num_threads=told.append)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {7, 5, 6, 4})
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, own: asked.append(set(own)))
    against.use_threads(torch, threads)
    assert (asked, told) == (cores, [threads])
