"""ring_attention: causal attention of a sequence that lies divided over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fnml.core import LayoutError, ShapeError, make_mesh
from fnml.models import causal_attention
from fnml.parallel import ring_attention


def make(axes):
    return make_mesh(axes, jax.devices()[: int(np.prod(list(axes.values())))])


def draw(T, H, K, B=2, D=4):
    rng = np.random.default_rng(T)
    return [jnp.asarray(rng.normal(size=(B, T, h, D)), jnp.float32) for h in (H, K, K)]


def textbook(q, k, v):
    """Causal attention in float64, from a T x T array."""
    q, k, v = map(np.float64, (q, k, v))
    T, D = q.shape[1], q.shape[3]
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(D)
    scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), v)


def relative(a, b):
    a, b = np.float64(a), np.float64(b)
    assert a.shape == b.shape
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def with_grads(attention):
    """Output and gradients, each output entering with a slope of its own."""

    def loss(q, k, v):
        out = attention(q, k, v)
        places = jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape) / out.size
        return jnp.sum(jnp.sin(3 * out) * places), out

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))


CASES = [
    ({"sequence": 1}, 6, 2, 2, {}),
    ({"sequence": 2}, 4, 2, 1, {}),
    ({"sequence": 3}, 12, 4, 2, {}),
    ({"sequence": 8}, 144, 4, 2, {}),
    ({"data": 2, "sequence": 2, "model": 2}, 24, 4, 2, {"batch": "data", "heads": "model"}),
    ({"data": 2, "sequence": 2}, 8, 2, 2, {}),
]


@pytest.mark.parametrize(("axes", "T", "H", "K", "options"), CASES, ids=str)
def test_it_is_causal_attention(axes, T, H, K, options):
    operands = draw(T, H, K)
    grads, out = with_grads(ring_attention(make(axes), **options))(*operands)
    assert relative(out, textbook(*operands)) <= 1e-6
    expected, _ = with_grads(causal_attention)(*operands)
    # Sums over keys in another order: a few ulps of float32, relative in norm.
    assert max(map(relative, grads, expected)) <= 1e-6


def test_a_later_key_changes_no_bit_and_bfloat16_stays():
    run = jax.jit(ring_attention(make({"sequence": 4})))
    q, k, v = (x.astype(jnp.bfloat16) for x in draw(32, 2, 2))
    out = run(q, k, v)
    assert out.dtype == jnp.bfloat16
    # The sums are float32, each visit's share is rounded to 8 bits once more.
    assert relative(out, textbook(q, k, v)) <= 5e-3
    for t in (0, 3, 17, 30):
        other = run(q, k.at[:, t + 1 :].add(1.0), v.at[:, t + 1 :].add(1.0))
        np.testing.assert_array_equal(other[:, : t + 1], out[:, : t + 1])
        assert not np.array_equal(other[:, t + 1 :], out[:, t + 1 :])


def test_memory_is_that_of_a_devices_part():
    """A sequence four times as long on four times as many devices needs the same on each."""

    def temporary(T, devices):
        mesh = make({"sequence": devices})
        lies = jax.sharding.NamedSharding(mesh, P(None, "sequence"))
        shapes = [jax.ShapeDtypeStruct((1, T, 2, 8), jnp.float32, sharding=lies)] * 3
        compiled = with_grads(ring_attention(mesh)).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(2048, 8) < 1.2 * temporary(512, 2)


def test_misuse_is_named():
    mesh = make({"data": 2, "sequence": 4})
    with pytest.raises(LayoutError, match=r"axis='sequenc'.*\('data', 'sequence'\).*'sequence'\?"):
        ring_attention(mesh, "sequenc")
    with pytest.raises(LayoutError, match="heads='data': batch has this axis already"):
        ring_attention(mesh, batch="data", heads="data")
    attention = ring_attention(mesh, batch="data")
    q, k, v = draw(12, 2, 2, B=3)
    with pytest.raises(LayoutError, match="B=3 is no multiple of 2; T=12 is no multiple of 8"):
        attention(q, k, v)
    with pytest.raises(LayoutError, match="K=1 is no multiple of 4"):
        ring_attention(mesh, "data", heads="sequence")(*draw(16, 4, 1))
    with pytest.raises(ShapeError, match=r"q float32 .*k float32 .*H a multiple of K"):
        attention(q, k[:, :4], v)
    q, k, v = draw(16, 2, 2)
    with pytest.raises(LayoutError, match=r"inside a shard_map or pmap over .*batch='data'"):
        jax.shard_map(attention, mesh=mesh, in_specs=P("data"), out_specs=P("data"))(q, k, v)
