"""A flax linen module as a model: flax's own bits, and every transform applies."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import fnml
from fnml.core import ConfigError, Metrics, ShapeError, State, fold_name, leaf_names, shard_key
from fnml.interop import to_linen_variables
from fnml.train import cross_entropy, train_step
from fnml.transforms import accumulate, data_parallel, fuse, remat

X = np.random.default_rng(0).normal(size=(8, 4, 4, 2)).astype(np.float32)
Y = np.arange(8, dtype=np.int32) % 3
KEY = jax.random.key(3)


def flat(x):
    return x.reshape(x.shape[0], -1)


class Perceptron(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(5)(flat(x))))


class SetupStyle(nn.Module):
    def setup(self):
        self.layers = [nn.Dense(5), nn.Dense(3)]

    def __call__(self, x):
        return self.layers[1](nn.relu(self.layers[0](flat(x))))

    def features(self, x):
        return self.layers[0](flat(x))


class ConvNorm(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.7)(nn.Conv(4, (3, 3))(x))
        return nn.Dense(3)(jnp.mean(nn.relu(x), (1, 2)))


class Dropped(nn.Module):
    rate: float = 0.5

    @nn.compact
    def __call__(self, x, deterministic):
        x = nn.Dense(16)(flat(x))
        x = nn.Dropout(self.rate)(x, deterministic=deterministic)
        return nn.Dense(3)(x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        kernel = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        return x + nn.tanh(nn.Dense(8, kernel_init=kernel)(x)), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = layers()(nn.Dense(8)(flat(x)), None)
        return nn.Dense(3)(x)


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(flat(x)) + jax.random.normal(self.make_rng("noise"), (3,))[None]


class Counting(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.variable("counters", "calls", lambda: jnp.zeros((), jnp.int32))
        return nn.Dense(3)(flat(x))


MODULES = {
    "perceptron": (Perceptron(), {}, {}),
    "setup style": (SetupStyle(), {}, {}),
    "convolution and batch norm": (ConvNorm(), {"train": False}, {"train": True}),
    "dropout": (Dropped(), {"deterministic": True}, {"deterministic": False}),
    "scan over layers": (Scanned(), {}, {}),
}


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def guest(name):
    model, params = fnml.from_linen(MODULES[name][0], X)
    return model, params, fnml.init(model.state, KEY)


def loss_of(model, stateful):
    def loss_fn(params, batch, key, **options):
        out = model.apply(params, batch["x"], key=key, **options)
        logits, stats = out if stateful else (out, ())
        loss = cross_entropy(logits, batch["y"])
        return loss.value, Metrics(loss.weight, {}, stats)

    return loss_fn


def case(name):
    model, params, state = guest(name)
    loss_fn = loss_of(model, bool(model.state))
    options = {"state": state} if model.state else {}
    return jax.value_and_grad(loss_fn, has_aux=True), loss_fn, params, options


@pytest.mark.parametrize("name", MODULES)
def test_parameters_and_state_are_those_of_the_modules_own_init(name):
    module, evaluating, _ = MODULES[name]
    model, params, state = guest(name)

    @jax.jit
    def own(key):
        return nn.meta.unbox(module.init({"params": key}, X, **evaluating))

    expected = own(jax.random.key(0))
    assert bits(params) == bits(expected["params"])
    assert jax.tree.structure(params) == jax.tree.structure(expected["params"])
    assert bits(state) == bits({k: v for k, v in expected.items() if k != "params"})
    assert bits(fnml.from_linen(module, X, key=KEY)[1]) == bits(own(KEY)["params"])
    # And the spec draws each leaf as the module does from that leaf's key.
    drawn = fnml.init(model.spec, KEY)
    for i, path in enumerate(leaf_names(params)):
        alone = jax.tree.leaves(own(fold_name(KEY, path))["params"])[i]
        assert bits(jax.tree.leaves(drawn)[i]) == bits(alone), path


@pytest.mark.parametrize("name", MODULES)
def test_outputs_and_gradients_have_flaxs_bits(name):
    module, evaluating, training = MODULES[name]
    model, params, state = guest(name)

    def theirs(params, key):
        rngs = {} if key is None else {"dropout": fold_name(key, "dropout")}
        flags = evaluating if key is None else training
        out, updated = module.apply(
            {"params": params, **(state or {})}, X, rngs=rngs, mutable=list(state or ()), **flags
        )
        return jnp.sum(out**2), (out, updated)

    def ours(params, key):
        options = {"state": state} if state else {}
        out = model.apply(params, X, key=key, **options)
        out, stats = out if state else (out, ())
        return jnp.sum(out**2), (out, stats)

    grad = [jax.jit(jax.grad(f, has_aux=True)) for f in (ours, theirs)]
    for key in (None, KEY):
        (mine, (out, stats)), (right, (expected, updated)) = (g(params, key) for g in grad)
        assert bits(mine) == bits(right) and bits(out) == bits(expected)
        if key is not None and state:
            assert bits(jax.tree.map(lambda s: s.value, stats, is_leaf=is_mean)) == bits(updated)
        else:
            assert stats == ()


def is_mean(x):
    return isinstance(x, fnml.Mean)


def test_a_step_without_momentum_of_its_own_trains_like_one_written_with_flax():
    module, (model, params, state) = ConvNorm(), guest("convolution and batch norm")
    batch = {"x": X, "y": Y}
    grad_fn = jax.value_and_grad(loss_of(model, True), has_aux=True)
    step = jax.jit(train_step(grad_fn, optax.sgd(0.1), momentum=0.0))
    run = State.create(params, optax.sgd(0.1), KEY, state)

    def loss_fn(params, state):
        logits, state = module.apply(
            {"params": params, **state}, X, train=True, mutable=list(state)
        )
        return cross_entropy(logits, Y).value, state

    @jax.jit
    def by_hand(params, state):
        grads, state = jax.grad(loss_fn, has_aux=True)(params, state)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), state

    start = state
    for _ in range(3):
        run, _ = step(run, batch)
        params, state = by_hand(params, state)
    for got, right, before in zip(
        *map(jax.tree.leaves, (run.model_state, state, start)), strict=True
    ):
        assert np.linalg.norm(right - before) > 0.01
        # Two compilations of one computation: some ulps of each, over three steps.
        np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODULES)
def test_a_round_trip_gives_the_original_module_the_same_function(name):
    module, evaluating, _ = MODULES[name]
    model, params, state = guest(name)
    params, state = jax.tree.map(lambda x: x * 1.5, (params, state))
    variables = to_linen_variables(model, params, state)
    options = {"state": state} if state else {}
    mine = model.apply(params, X, **options)
    right = module.apply(variables, X, **evaluating)
    assert bits(mine[0] if state else mine) == bits(right)


@pytest.mark.parametrize("name", ["convolution and batch norm", "dropout", "scan over layers"])
def test_transforms_apply(name):
    grad_fn, loss_fn, params, options = case(name)
    batch, compiled = {"x": X, "y": Y}, jax.jit(grad_fn)

    def run(f):
        return jax.jit(f)(params, batch, KEY, **options)

    accumulated = run(accumulate(grad_fn, 2))
    # The law, written out: the weighted mean of the shards.
    shards = [
        compiled(
            params,
            jax.tree.map(lambda x, i=i: x[4 * i : 4 * i + 4], batch),
            shard_key(KEY, i),
            **options,
        )
        for i in range(2)
    ]
    for got, *parts in zip(
        *map(jax.tree.leaves, (accumulated[1], *(s[1] for s in shards))), strict=True
    ):
        np.testing.assert_allclose(got, np.mean(parts, 0), rtol=1e-5, atol=1e-6)
    for got, *parts in zip(
        *map(jax.tree.leaves, (accumulated[0][1].stats, *(s[0][1].stats for s in shards))),
        strict=True,
    ):
        np.testing.assert_allclose(got, np.sum(parts, 0), rtol=1e-6)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    parallel = run(data_parallel(grad_fn, mesh))
    if name != "convolution and batch norm":
        assert bits(parallel) == bits(accumulated)
    # XLA lowers linen's convolution otherwise inside accumulate's loop: equal up to rounding.
    for got, right in zip(*map(jax.tree.leaves, (parallel, accumulated)), strict=True):
        np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-6)
    again, plain = run(jax.value_and_grad(remat(loss_fn), has_aux=True)), run(grad_fn)
    for got, right in zip(*map(jax.tree.leaves, (again, plain)), strict=True):
        np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["dropout", "scan over layers"])
def test_fused_steps_have_the_bits_of_single_ones(name):
    grad_fn, _, params, options = case(name)
    step = train_step(grad_fn, optax.sgd(0.1), momentum=0.0)
    run = State.create(params, optax.sgd(0.1), KEY, options.get("state", ()))
    batches = {"x": np.stack([X, X[::-1]]), "y": np.stack([Y, Y[::-1]])}
    fused, _ = jax.jit(fuse(step, 2))(run, batches)
    single = jax.jit(step)
    for i in range(2):
        run, _ = single(run, jax.tree.map(lambda x, i=i: x[i], batches))
    assert bits(fused.params) == bits(run.params)


def test_partitioned_parameters_have_axes_that_become_shardings():
    model, params = fnml.from_linen(Scanned(), X)
    kernel = model.spec["ScanBlock_0"]["Dense_0"]["kernel"]
    assert kernel.axes == ("layers", "embed", "mlp") and kernel.shape == (2, 8, 8)
    assert model.spec["Dense_0"]["kernel"].axes == (None, None)
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    shardings = fnml.shardings(model.spec, mesh, {"mlp": "model"})
    sharded = fnml.init(model.spec, KEY, shardings)["ScanBlock_0"]["Dense_0"]["kernel"]
    assert sharded.addressable_shards[0].data.shape == (2, 8, 2)
    assert bits(sharded) == bits(fnml.init(model.spec, KEY)["ScanBlock_0"]["Dense_0"]["kernel"])
    assert bits(params) != bits(fnml.init(model.spec, jax.random.key(0)))


def test_an_example_of_shapes_alone_is_enough():
    shape = jax.ShapeDtypeStruct(X.shape, jnp.float32)
    model, params = fnml.from_linen(Perceptron(), shape)
    assert bits(params) == bits(fnml.from_linen(Perceptron(), X)[1])
    assert model.apply(params, X).shape == (8, 3)


def test_another_method_and_other_keywords():
    model, params = fnml.from_linen(SetupStyle(), X, method="features")
    assert model.apply(params, X).shape == (8, 5)
    own = fnml.from_linen(Dropped(), X, flags=lambda train: {"deterministic": True})
    assert bits(own[0].apply(own[1], X, key=KEY)) == bits(own[0].apply(own[1], X))
    fixed, params = fnml.from_linen(Dropped(), X, deterministic=True)
    assert bits(fixed.apply(params, X, key=KEY)) == bits(fixed.apply(params, X))
    assert bits(fixed.apply(params, X, key=KEY, deterministic=False)) != bits(
        fixed.apply(params, X)
    )


def test_what_the_module_needs_and_does_not_get_is_named():
    model, params = fnml.from_linen(Noisy(), X)
    with pytest.raises(ConfigError, match=r"stream 'noise'.*rngs=\('dropout', 'noise'\)"):
        model.apply(params, X, key=KEY)
    model, params = fnml.from_linen(Noisy(), X, rngs=("noise",))
    with pytest.raises(ConfigError, match="stream 'noise': call it with key="):
        model.apply(params, X)
    assert np.all(model.apply(params, X, key=KEY) != model.apply(params, X, key=jax.random.key(9)))
    with pytest.raises(ConfigError, match="without 'params'"):
        fnml.from_linen(Noisy(), X, rngs="noise")


def test_a_wrong_example_is_named():
    with pytest.raises(
        ShapeError, match=r"ConvNorm cannot be called on the example \(float32\[8\]\)"
    ):
        fnml.from_linen(ConvNorm(), X[:, 0, 0, 0])
    with pytest.raises(ShapeError, match=r"Perceptron cannot be called on the example \(\)"):
        fnml.from_linen(Perceptron())


def test_state_that_cannot_be_merged_is_refused_by_path():
    with pytest.raises(ConfigError, match=r"counters/calls: int32\[\]"):
        fnml.from_linen(Counting(), X)


def test_a_missing_state_and_wrong_parameters_are_named():
    model, params = fnml.from_linen(ConvNorm(), X)
    with pytest.raises(ShapeError, match="pass state="):
        model.apply(params, X)
    with pytest.raises(ShapeError, match=r"Dense_0/kernel: expected float32\[4, 3\], got nothing"):
        to_linen_variables(model, {"BatchNorm_0": params["BatchNorm_0"]})
