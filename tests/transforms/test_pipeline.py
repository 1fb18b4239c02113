"""pipeline: the values and gradients of a scan, from layers that live on different devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fnml.core import LayoutError, Mean, Metrics, ShapeError, make_mesh, shard_key
from fnml.transforms import accumulate, data_parallel, pipeline, remat

LAYERS, BATCH, WIDTH = 4, 16, 6
KEYS = jax.random.split(jax.random.key(2), LAYERS)
NUMBERS = jnp.arange(LAYERS)


def make(axes):
    return make_mesh(axes, jax.devices()[: int(np.prod(list(axes.values())))])


def draw():
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(LAYERS, WIDTH, WIDTH)) / 3, jnp.float32)
    x = jnp.asarray(rng.normal(size=(BATCH, WIDTH)), jnp.float32)
    scale = jnp.asarray(rng.uniform(0.5, 1.5, (1, WIDTH)), jnp.float32)
    return {"w": w, "x": x, "scale": scale}


MASK = (jnp.arange(BATCH) % 5 > 0).reshape(BATCH, 1)


def layer_of(scale, drop):
    """A layer over (x, mask) that draws, reads its own number, and returns a second output."""

    def layer(carry, inputs):
        x, mask = carry
        w, key, number = inputs
        h = jnp.tanh(x @ w) * scale * jnp.where(mask, 1.0, 0.5)
        if drop:
            h = jnp.where(jax.random.bernoulli(key, 0.8, h.shape), h, 0.0)
        return (x + h * (1.0 + number.astype(jnp.float32)), mask), jnp.mean(h)

    return layer


def by_parts(layer, count):
    """The law's right side: each micro-batch through a scan of its own."""

    def run(carry, stacked):
        w, keys, numbers = stacked
        outs, seen = [], []
        for i in range(count):
            part = jax.tree.map(lambda x, i=i: jnp.split(x, count)[i], carry)
            own = jax.vmap(lambda key, i=i: shard_key(key, i))(keys)
            out, ys = lax.scan(layer, part, (w, own, numbers))
            outs.append(out)
            seen.append(ys)
        return jax.tree.map(lambda *xs: jnp.concatenate(xs), *outs), jnp.stack(seen, 1)

    return run


def evaluate(transform, drop=True, arrays=None):
    """Value and gradients of a loss that every output enters with a weight of its own."""

    def loss(arrays):
        run = transform(layer_of(arrays["scale"], drop))
        (x, _), ys = run((arrays["x"], MASK), (arrays["w"], KEYS, NUMBERS))
        weights = jnp.arange(1, ys.size + 1, dtype=jnp.float32).reshape(ys.shape)
        return jnp.sum(jnp.sin(x)) + jnp.sum(weights * ys)

    return jax.jit(jax.value_and_grad(loss))(draw() if arrays is None else arrays)


def assert_close(a, b, rounding=1e-6):
    """Each gradient to some ulps of float32, relative in norm: products of fewer rows."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        x, y = np.float64(x), np.float64(y)
        assert x.shape == y.shape
        assert np.linalg.norm(x - y) <= rounding * np.linalg.norm(y)


CASES = [
    ({"stage": 1}, None, 1),
    ({"stage": 4}, None, 1),
    ({"stage": 2}, None, 8),
    ({"data": 2, "stage": 4}, "data", 2),
    ({"stage": 2, "pod": 2, "data": 2}, ("pod", "data"), 2),
    ({"data": 2, "stage": 2, "model": 2}, "data", 4),
]


@pytest.mark.parametrize(("axes", "batch", "count"), CASES, ids=str)
def test_a_pipeline_is_a_scan_over_each_microbatch(axes, batch, count):
    mesh = make(axes)
    names = (batch,) if isinstance(batch, str) else batch or ()
    shards = count * int(np.prod([axes[name] for name in names]))
    got = evaluate(lambda f: pipeline(f, mesh, microbatches=count, batch=batch))
    assert_close(got, evaluate(lambda f: by_parts(f, shards)))


def test_without_keys_it_is_one_scan_and_the_second_output_is_by_layer_and_microbatch():
    mesh = make({"stage": 2, "data": 2})
    transform = functools.partial(pipeline, mesh=mesh, microbatches=4, batch="data")

    def run(transform):
        def of(x, w):
            return transform(lambda x, w: (jnp.tanh(x @ w), jnp.mean(x)))(x, w)

        return jax.jit(of)(draw()["x"], draw()["w"])

    (x, ys), (x_r, _) = run(transform), run(lambda f: functools.partial(lax.scan, f))
    assert_close(x, x_r)
    inputs = [draw()["x"]]
    for w in draw()["w"]:
        inputs.append(np.tanh(np.float64(inputs[-1]) @ np.float64(w)))
    means = np.stack([np.mean(np.float64(h).reshape(8, -1), 1) for h in inputs[:-1]])
    assert ys.shape == (LAYERS, 8)
    np.testing.assert_allclose(ys, means, atol=1e-6)


def test_remat_and_sharded_parameters_change_nothing():
    mesh = make({"stage": 4, "data": 2})
    arrays = draw()
    arrays["w"] = jax.device_put(arrays["w"], NamedSharding(mesh, P("stage")))
    arrays["x"] = jax.device_put(arrays["x"], NamedSharding(mesh, P("data")))

    def transform(layer):
        return pipeline(remat(layer, scope="whole"), mesh, microbatches=2, batch="data")

    got = evaluate(transform, arrays=arrays)
    assert_close(got, evaluate(lambda f: by_parts(f, 4)))
    assert got[1]["w"].sharding.is_equivalent_to(arrays["w"].sharding, 3)


def test_an_idle_stage_makes_no_nan():
    """The length of zeros has no derivative; what is idle must not meet them."""
    mesh = make({"stage": 4})

    def layer(x, w):
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True) + x @ w, None

    def grads(run):
        return jax.jit(jax.grad(lambda x, w: jnp.sum(jnp.sin(run(x, w)[0])), (0, 1)))(
            draw()["x"], draw()["w"]
        )

    got = grads(pipeline(layer, mesh, microbatches=2))
    assert_close(got, grads(functools.partial(lax.scan, layer)))


def test_it_goes_inside_accumulate_and_is_refused_inside_data_parallel():
    mesh = make({"stage": 2, "data": 2})
    run = pipeline(lambda x, w: (jnp.tanh(x @ w), None), mesh, microbatches=2, batch="data")

    def grad_fn(stack):
        def loss_fn(params, batch, key):
            error = Mean.of(stack(batch, params)[0] ** 2)
            return error.value, Metrics(error.weight)

        return jax.value_and_grad(loss_fn, has_aux=True)

    args = draw()["w"], draw()["x"], jax.random.key(0)
    plain = grad_fn(lambda x, w: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w))
    got = jax.jit(accumulate(grad_fn(run), 2))(*args)
    assert_close(got[1], jax.jit(plain)(*args)[1])
    with pytest.raises(LayoutError, match=r"inside a shard_map or pmap over .*batch='data'"):
        data_parallel(grad_fn(run), mesh)(*args)


def test_misuse_is_named():
    mesh = make({"stage": 4, "data": 2})
    x, w = draw()["x"], draw()["w"]

    def layer(x, w):
        return x @ w, None

    with pytest.raises(LayoutError, match=r"axis='stge'.*\('stage', 'data'\).*'stage'\?"):
        pipeline(layer, mesh, "stge", microbatches=2)
    with pytest.raises(LayoutError, match="batch='stage': axis has this axis already"):
        pipeline(layer, mesh, microbatches=2, batch="stage")
    with pytest.raises(LayoutError, match="microbatches=0: expected 1 or more"):
        pipeline(layer, mesh, microbatches=0)
    run = pipeline(layer, mesh, microbatches=4, batch="data")
    with pytest.raises(LayoutError, match=r"a batch of 12 examples .* into 8 equal shards"):
        run(x[:12], w)
    with pytest.raises(LayoutError, match="3 layers, which 4 stages along 'stage' do not"):
        run(x, w[:3])
    with pytest.raises(ShapeError, match=r"a: \(4, 6, 6\), b: \(3, 6, 6\)"):
        run(x, {"a": w, "b": w[:3]})
    with pytest.raises(ShapeError, match="no arrays"):
        run(x, None)
