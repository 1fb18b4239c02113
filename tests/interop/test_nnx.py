"""A flax nnx module as a model: the module's own bits, and every transform applies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fnml
from fnml.core import ConfigError, Metrics, ShapeError, State, fold_name, leaf_names, shard_key
from fnml.interop import into_nnx
from fnml.train import cross_entropy, train_step
from fnml.transforms import accumulate, data_parallel, fuse, remat

X = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
Y = np.arange(8, dtype=np.int32) % 3
KEY = jax.random.key(3)


class Perceptron(nnx.Module):
    def __init__(self, width=5, *, rngs):
        kernel = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "mlp"))
        self.layers = nnx.List(
            [
                nnx.Linear(6, width, kernel_init=kernel, rngs=rngs),
                nnx.Linear(width, 3, rngs=rngs),
            ]
        )

    def __call__(self, x):
        return self.layers[1](nnx.relu(self.layers[0](x)))

    def features(self, x):
        return self.layers[0](x)


class NormAndDropout(nnx.Module):
    def __init__(self, *, rngs):
        self.first = nnx.Linear(6, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.7, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(16, 3, rngs=rngs)
        self.offset = jnp.arange(3.0)

    def __call__(self, x):
        x = self.drop(nnx.relu(self.norm(self.first(x))))
        return self.last(x) + self.offset[None]


class Counting(nnx.Module):
    def __init__(self, *, rngs):
        self.layer = nnx.Linear(6, 3, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        return self.layer(x)


@functools.cache
def guest(constructor):
    model, params = fnml.from_nnx(constructor)
    return model, params, fnml.init(model.state, KEY)


def built(constructor, key=None):
    with nnx.use_eager_sharding(False):
        return constructor(rngs=nnx.Rngs(jax.random.key(0) if key is None else key))


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def values(tree):
    return jax.tree.map(lambda s: s.value, tree, is_leaf=lambda x: isinstance(x, fnml.Mean))


def loss_of(model):
    def loss_fn(params, batch, key, **options):
        out = model.apply(params, batch["x"], key=key, **options)
        logits, stats = out if model.state else (out, ())
        loss = cross_entropy(logits, batch["y"])
        return loss.value, Metrics(loss.weight, {}, stats)

    return loss_fn


@pytest.mark.parametrize("constructor", [Perceptron, NormAndDropout])
def test_parameters_and_state_are_those_that_the_constructor_makes(constructor):
    model, params, state = guest(constructor)
    own = built(constructor)
    assert bits(params) == bits(nnx.to_pure_dict(nnx.state(own, nnx.Param)))
    assert bits(state) == bits(nnx.to_pure_dict(nnx.state(own, nnx.BatchStat)))
    drawn = jax.tree.leaves(fnml.init(model.spec, KEY))
    for i, path in enumerate(leaf_names(params)):
        alone = nnx.state(built(constructor, fold_name(KEY, path)), nnx.Param)
        # The constructor runs operation by operation, init compiled: their last bits can differ.
        np.testing.assert_allclose(drawn[i], jax.tree.leaves(alone)[i], rtol=1e-6, err_msg=path)


def by_hand(params, state, key):
    """What a user of nnx writes: the module, its streams set, its state read back."""
    module = built(NormAndDropout)
    nnx.update(module, nnx.State(params))
    nnx.update(module, nnx.State(state))
    module.drop.rngs.key.set_value(fold_name(KEY if key is None else key, "drop/rngs"))
    module.drop.rngs.count.set_value(jnp.zeros((), jnp.uint32))
    if key is None:
        module.eval()
    else:
        module.train()
    out = module(X)
    return jnp.sum(out**2), (out, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat)))


@pytest.mark.parametrize("key", [None, KEY])
def test_outputs_gradients_and_statistics_have_the_modules_bits(key):
    model, params, state = guest(NormAndDropout)

    def ours(params, state, key):
        out, stats = model.apply(params, X, state=state, key=key)
        return jnp.sum(out**2), (out, stats)

    (mine, (out, stats)), (right, (expected, after)) = (
        jax.jit(jax.grad(f, has_aux=True))(params, state, key) for f in (ours, by_hand)
    )
    assert bits(mine) == bits(right) and bits(out) == bits(expected)
    assert stats == () if key is None else bits(values(stats)) == bits(after)
    assert key is None or bits(after) != bits(state)


def test_dropout_follows_the_key_and_evaluation_does_not_drop():
    model, params, state = guest(NormAndDropout)

    def run(key, train=None):
        return model.apply(params, X, state=state, key=key, train=train)[0]

    assert bits(run(KEY)) == bits(run(KEY)) != bits(run(jax.random.key(4)))
    assert bits(run(None)) == bits(run(KEY, train=False))
    with pytest.raises(ConfigError, match="NormAndDropout has random streams and trains"):
        run(None, train=True)


@pytest.mark.parametrize("constructor", [Perceptron, NormAndDropout])
def test_a_round_trip_gives_the_original_module_the_same_function(constructor):
    model, params, state = guest(constructor)
    params, state = jax.tree.map(lambda x: x * 1.5, (params, state))
    module = built(constructor)
    into_nnx(module, params, state)
    module.eval()
    mine = model.apply(params, X, **({"state": state} if state else {}))
    assert bits(mine[0] if state else mine) == bits(module(X))


def test_nothing_is_written_into_a_module_that_does_not_fit():
    _, params, _ = guest(Perceptron)
    module = built(functools.partial(Perceptron, 7))
    before = bits(nnx.state(module))
    with pytest.raises(ShapeError, match=r"layers/0/bias: expected float32\[7\], got float32\[5\]"):
        into_nnx(module, params)
    assert bits(nnx.state(module)) == before


def test_transforms_apply():
    model, params, state = guest(NormAndDropout)
    loss_fn, batch = loss_of(model), {"x": X, "y": Y}
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def run(f, batch=batch, key=KEY):
        return jax.jit(f)(params, batch, key, state=state)

    accumulated = run(accumulate(grad_fn, 2))
    halves = [jax.tree.map(lambda x, i=i: x[4 * i : 4 * i + 4], batch) for i in range(2)]
    shards = [run(grad_fn, half, shard_key(KEY, i)) for i, half in enumerate(halves)]
    for got, *parts in zip(
        *map(jax.tree.leaves, (accumulated[1], *(s[1] for s in shards))), strict=True
    ):
        np.testing.assert_allclose(got, np.mean(parts, 0), rtol=1e-5, atol=1e-6)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    # nnx's batch norm is fused otherwise inside accumulate's loop: equal up to rounding.
    parallel = run(data_parallel(grad_fn, mesh))
    for got, right in zip(*map(jax.tree.leaves, (parallel, accumulated)), strict=True):
        np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-6)
    again, plain = run(jax.value_and_grad(remat(loss_fn), has_aux=True)), run(grad_fn)
    for got, right in zip(*map(jax.tree.leaves, (again, plain)), strict=True):
        np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-6)


def test_fused_steps_have_the_bits_of_single_ones():
    model, params, state = guest(NormAndDropout)
    grad_fn = jax.value_and_grad(loss_of(model), has_aux=True)
    step = train_step(grad_fn, optax.sgd(0.1), momentum=0.0)
    run = State.create(params, optax.sgd(0.1), KEY, state)
    batches = {"x": np.stack([X, X[::-1]]), "y": np.stack([Y, Y[::-1]])}
    fused, _ = jax.jit(fuse(step, 2))(run, batches)
    single = jax.jit(step)
    for i in range(2):
        run, _ = single(run, jax.tree.map(lambda x, i=i: x[i], batches))
    assert bits(fused.params) == bits(run.params)
    assert bits(fused.model_state) == bits(run.model_state) != bits(state)


def test_sharding_metadata_are_axes_that_become_shardings():
    model, _, _ = guest(Perceptron)
    assert model.spec["layers"]["0"]["kernel"].axes == ("embed", "mlp")
    assert model.spec["layers"]["1"]["kernel"].axes == (None, None)
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    shardings = fnml.shardings(model.spec, mesh, {"embed": "model"})
    kernel = fnml.init(model.spec, KEY, shardings)["layers"]["0"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 5)


def test_an_instance_keeps_its_values_and_is_not_changed():
    module = built(NormAndDropout, jax.random.key(8))
    before = bits(nnx.state(module, nnx.Param, nnx.BatchStat))
    model, params = fnml.from_nnx(module)
    assert bits(fnml.init(model.spec, KEY)) == bits(params)
    model.apply(params, X, state=fnml.init(model.state, KEY), key=KEY)
    assert bits(nnx.state(module, nnx.Param, nnx.BatchStat)) == before
    assert not module.drop.deterministic


def test_another_method():
    model, params = fnml.from_nnx(Perceptron, method="features")
    assert model.apply(params, X).shape == (8, 5)


def test_what_is_no_module_is_named():
    with pytest.raises(ConfigError, match=r"Linear cannot be called as constructor\(rngs=\.\.\.\)"):
        fnml.from_nnx(nnx.Linear)
    with pytest.raises(ConfigError, match=r"constructs int, expected an nnx\.Module"):
        fnml.from_nnx(lambda rngs: 3)


def test_state_that_cannot_be_merged_is_refused_by_path():
    with pytest.raises(ConfigError, match=r"Counting keeps state .* calls: int32\[\]"):
        fnml.from_nnx(Counting)


def test_a_missing_state_is_named():
    model, params, _ = guest(NormAndDropout)
    with pytest.raises(ShapeError, match="pass state="):
        model.apply(params, X)
