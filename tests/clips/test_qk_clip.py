"""QK-Clip: no logit is above the threshold."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import helpers
from helpers import oc


def np_qk_clip(query, key, max_logits, *, threshold=100.0, alpha=0.5):
    """Kernels (features, heads, head_dim), with fewer heads in the key."""
    query, key = np.array(query, np.float64), np.array(key, np.float64)
    eta = [min(1, threshold / s) if 0 < s < np.inf else 1.0 for s in max_logits]
    group = query.shape[-2] // key.shape[-2]
    for h, e in enumerate(eta):
        query[..., h, :] *= e**alpha
    for h in range(key.shape[-2]):
        key[..., h, :] *= min(eta[h * group : (h + 1) * group]) ** (1 - alpha)
    return query, key


LOGITS = np.array([50.0, 100.0, 400.0, 1e30], np.float32)


def heads(rng, count, dtype=np.float32):
    return rng.normal(size=(5, count, 3)).astype(dtype)


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_qk_clip_is_the_equation_also_of_shared_keys(key_heads, alpha):
    rng = np.random.default_rng(0)
    query, key = heads(rng, 4), heads(rng, key_heads)
    found = oc.qk_clip(query, key, LOGITS, 100.0, alpha)
    expected = np_qk_clip(query, key, LOGITS, alpha=alpha)
    helpers.assert_close(found, expected, rtol=2e-6)


@pytest.mark.parametrize("options", [{"threshold": 100.1}, {"alpha": 0.51}])
def test_another_constant_is_another_qk_clip(options):
    rng = np.random.default_rng(0)
    query, key = heads(rng, 4), heads(rng, 2)
    found = oc.qk_clip(query, key, LOGITS)
    assert helpers.is_close(found, np_qk_clip(query, key, LOGITS), 2e-6)
    assert not helpers.is_close(found, np_qk_clip(query, key, LOGITS, **options), 2e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float8_e4m3fn"])
def test_heads_within_the_threshold_come_back_bit_for_bit(dtype):
    rng = np.random.default_rng(0)
    query = {"kernel": jnp.asarray(heads(rng, 4)).astype(dtype), "n": jnp.arange(3)}
    odd = jnp.finfo(dtype).smallest_subnormal
    query["kernel"] = query["kernel"].at[0, 0, 0].set(odd)
    new, empty = oc.qk_clip(query, None, LOGITS)
    assert empty is None
    assert helpers.types(new) == helpers.types(query)
    kept = new["kernel"][:, :2]
    assert helpers.bits(kept) == helpers.bits(query["kernel"][:, :2])
    half = helpers.truth(query["kernel"])[:, 2] / 2
    helpers.assert_close(new["kernel"][:, 2], half)
    assert helpers.bits(new["n"]) == helpers.bits(query["n"])


@pytest.mark.parametrize("logit", [np.nan, np.inf, -np.inf, -500.0, 0.0])
def test_a_logit_that_says_nothing_leaves_its_head(logit):
    rng = np.random.default_rng(0)
    query, key = heads(rng, 2), heads(rng, 2)
    new = oc.qk_clip(query, key, jnp.array([logit, 400.0]))
    assert helpers.bits([x[:, 0] for x in new]) == helpers.bits(
        [query[:, 0], key[:, 0]]
    )
    np.testing.assert_allclose(new[0][:, 1], query[:, 1] / 2, rtol=1e-6)


def test_heads_of_stacked_layers_have_their_own_logits():
    rng = np.random.default_rng(0)
    kernels = np.stack([heads(rng, 4), heads(rng, 4)])
    biases = kernels[:, 0]
    logits = np.stack([LOGITS, LOGITS[::-1]])
    (kernel, bias), _ = oc.qk_clip((kernels, biases), None, logits)
    for i in range(2):
        alone, _ = oc.qk_clip((kernels[i], biases[i]), None, logits[i])
        assert helpers.bits((kernel[i], bias[i])) == helpers.bits(alone)


def logits_of(module, params, x):
    """The largest logit of every head, seen in the middle of Flax's own layer."""
    seen = []

    def attention(query, key, value, **_):
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
        seen.append(jnp.max(logits, axis=(0, 2, 3)))
        return jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(logits), value)

    layer = module.clone(attention_fn=attention)
    out = layer.apply({"params": params}, x)
    np.testing.assert_allclose(out, module.apply({"params": params}, x), rtol=1e-3)
    return seen[0]


def test_after_the_clip_of_a_flax_layer_no_logit_is_above_the_threshold():
    module = nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=16)
    x = jax.random.normal(jax.random.key(0), (2, 6, 8))
    params: Any = module.init(jax.random.key(1), x)["params"]
    biases = jax.random.normal(jax.random.key(2), (2, 4, 4))
    params["query"] = {"kernel": 3 * params["query"]["kernel"], "bias": biases[0]}
    params["key"] = {"kernel": 3 * params["key"]["kernel"], "bias": biases[1]}
    before = logits_of(module, params, x)
    threshold = float(jnp.median(before))
    query, key = jax.jit(oc.qk_clip)(params["query"], params["key"], before, threshold)
    after = logits_of(module, params | {"query": query, "key": key}, x)
    assert (before > threshold).sum() == 2
    np.testing.assert_allclose(after, np.minimum(before, threshold), rtol=1e-5)


def test_each_device_clips_its_own_heads():
    rng = np.random.default_rng(0)
    query, key = heads(rng, 4), heads(rng, 4)
    spec, kinds = P(None, "heads"), (AxisType.Auto,)
    mapped = jax.shard_map(
        oc.qk_clip,
        mesh=jax.make_mesh((4,), ("heads",), kinds, devices=jax.devices()[:4]),
        in_specs=(spec, spec, P("heads")),
        out_specs=(spec, spec),
    )
    found = jax.jit(mapped)(query, key, LOGITS)
    helpers.assert_close(found, oc.qk_clip(query, key, LOGITS))


def ones(*shape):
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": -1.0}, "Expected threshold >= 0, got -1"),
        ({"alpha": 1.5}, "Expected 0 <= alpha <= 1, got 1.5"),
        ({"max_logits": 3.0}, r"one logit per head, .* got an array of shape \(\)"),
        (
            {"max_logits": np.ones(3, np.float32)},
            r"Expected 3 heads .* at 'kernel', .* \(2, 4, 3",
        ),
        (
            {"max_logits": ones(5, 4)},
            r"axis -2 of the query at 'kernel'",
        ),
        (
            {"key": ones(2, 3, 3)},
            r"a divisor of 4 heads .* key at '', .* \(2, 3",
        ),
    ],
)
def test_what_does_not_fit_raises(arguments, message):
    known: dict[str, Any] = {
        "query": {"kernel": ones(2, 4, 3)},
        "key": None,
        "max_logits": ones(4),
    }
    with pytest.raises(ValueError, match=message):
        oc.qk_clip(**(known | arguments))
