"""The step: one gradient, one update, and what it reports."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fnml.core import ConfigError, Mean, Metrics, ShapeError, State, step_key
from fnml.train import eval_step, evaluator, train_step

SGD = optax.sgd(0.5)


def quadratic(params, batch, key):
    error = Mean.of((batch - params["w"]) ** 2)
    return error.value, Metrics(error.weight, {"above": Mean.of(batch > params["w"])})


def start(params, optimizer=SGD, model_state=()):
    return State.create(params, optimizer, jax.random.key(3), model_state)


def grad(loss_fn):
    return jax.value_and_grad(loss_fn, has_aux=True)


def test_a_step_descends_counts_and_reports():
    step = train_step(grad(quadratic), SGD, grad_norm=True)
    state = start({"w": jnp.float32(1.0)})
    new, metrics = jax.jit(step)(state, jnp.array([2.0, 4.0, 0.0]))
    # The gradient of the mean of (x - w)**2 is -2 * mean(x - w) = -2.
    assert float(new.params["w"]) == 2.0
    assert int(new.step) == 1 and new.step.dtype == jnp.int32
    assert float(metrics["loss"].value) == pytest.approx(11 / 3)
    assert float(metrics["loss"].weight) == 3.0
    assert float(metrics["above"].value) == pytest.approx(2 / 3)
    assert (float(metrics["grad_norm"].total), float(metrics["grad_norm"].weight)) == (2.0, 1.0)
    assert jax.random.key_data(new.key).tolist() == jax.random.key_data(state.key).tolist()
    assert "grad_norm" not in train_step(grad(quadratic), SGD)(state, jnp.ones(2))[1]


def test_the_key_is_that_of_the_step():
    def noise(params, batch, key):
        return params["w"] * jax.random.normal(key), Metrics(jnp.float32(1))

    step = jax.jit(train_step(grad(noise), SGD))
    state = start({"w": jnp.float32(1.0)})
    for i in range(3):
        expected = state.params["w"] * jax.random.normal(step_key(state.key, i))
        state, metrics = step(state, jnp.zeros(1))
        assert float(metrics["loss"].total) == float(expected)


def test_only_a_model_with_state_is_given_its_state():
    seen = []

    def loss_fn(params, batch, key, **options):
        seen.append(options)
        stats = jax.tree.map(lambda x: Mean.of(x), options.get("state", ()))
        return jnp.sum(params["w"]), Metrics(jnp.float32(1), {}, stats)

    step = train_step(grad(loss_fn), SGD)
    step(start({"w": jnp.zeros(2)}), jnp.zeros(1))
    assert seen.pop() == {}
    step(start({"w": jnp.zeros(2)}, model_state={"m": jnp.float32(4)}), jnp.zeros(1))
    assert list(seen.pop()) == ["state"]


@pytest.mark.parametrize("momentum", [0.0, 0.75])
def test_statistics_are_folded_into_a_moving_average(momentum):
    def loss_fn(params, batch, key, *, state):
        stats = {"mean": Mean(batch.sum(0), jnp.full(2, 4.0))}
        return jnp.sum(params["w"]), Metrics(jnp.float32(1), {}, stats)

    state = start({"w": jnp.zeros(2)}, model_state={"mean": jnp.array([1.0, -2.0])})
    batch = jnp.arange(8.0).reshape(4, 2)
    new, _ = train_step(grad(loss_fn), SGD, momentum=momentum)(state, batch)
    expected = momentum * np.array([1.0, -2.0]) + (1 - momentum) * np.array([3.0, 4.0])
    np.testing.assert_allclose(new.model_state["mean"], expected, rtol=1e-7)


@pytest.mark.parametrize(
    "stats", [(), {"mean": jnp.ones(2)}, {"variance": Mean(jnp.zeros(2), jnp.ones(2))}]
)
def test_statistics_of_another_structure_are_named(stats):
    def loss_fn(params, batch, key, *, state):
        return jnp.sum(params["w"]), Metrics(jnp.float32(1), {}, stats)

    state = start({"w": jnp.zeros(2)}, model_state={"mean": jnp.zeros(2)})
    step = train_step(grad(loss_fn), SGD)
    with pytest.raises(ShapeError, match=r"mirror the model's state.*'mean'"):
        step(state, jnp.zeros(1))


def test_a_batch_where_nothing_counts_reports_a_loss_of_weight_0():
    def loss_fn(params, batch, key):
        return params["w"] * jnp.nan, Metrics(jnp.float32(0))

    _, metrics = train_step(grad(loss_fn), SGD)(start({"w": jnp.float32(1)}), jnp.zeros(1))
    assert (float(metrics["loss"].total), float(metrics["loss"].weight)) == (0.0, 0.0)


def test_reserved_names_and_a_momentum_out_of_range_are_refused():
    def loss_fn(params, batch, key):
        return params["w"], Metrics(jnp.float32(1), {"loss": Mean.of(batch)})

    with pytest.raises(ConfigError, match="cannot be named 'loss'"):
        train_step(grad(loss_fn), SGD)(start({"w": jnp.float32(1)}), jnp.zeros(1))
    for momentum in (1.0, -0.1):
        with pytest.raises(ConfigError, match="momentum"):
            train_step(grad(quadratic), SGD, momentum=momentum)


def test_evaluation_has_no_key_and_changes_nothing():
    def loss_fn(params, batch, key, *, state):
        assert key is None
        return params["w"] + state["m"], Metrics(jnp.float32(2), {"size": Mean.of(batch)})

    state = start({"w": jnp.float32(1)}, model_state={"m": jnp.float32(4)})
    metrics = jax.jit(eval_step(loss_fn))(state, jnp.array([1.0, 3.0]))
    assert {name: float(m.value) for name, m in metrics.items()} == {"loss": 5.0, "size": 2.0}


def test_an_evaluator_merges_batches_of_unequal_weight_and_reads_them_anew():
    calls = []

    def batches():
        calls.append(1)
        return iter([jnp.array([1.0, 2.0, 3.0]), jnp.array([10.0])])

    evaluate = evaluator(quadratic, batches)
    state = start({"w": jnp.float32(0)})
    for _ in range(2):
        metrics = evaluate(state)
        assert float(metrics["loss"].value) == pytest.approx((1 + 4 + 9 + 100) / 4)
        assert float(metrics["loss"].weight) == 4.0
    assert len(calls) == 2
    with pytest.raises(ConfigError, match="no batches"):
        evaluator(quadratic, list)(state)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda mean: mean.value, r"this one returns array\[\]"),
        (lambda mean: (mean.value, {"loss": mean}), r"\(array\[\], dict\)"),
        (lambda mean: (mean, Metrics(mean.weight)), r"\(Mean, Metrics\)"),
        (lambda mean: (mean.value[None], Metrics(mean.weight)), r"\(array\[1\], Metrics\)"),
    ],
)
def test_a_loss_that_returns_something_else_is_refused_by_its_contract(returned, said) -> None:
    def loss_fn(params, batch, key):
        return returned(Mean.of(batch * params))

    state = State.create(jnp.float32(1.0), optax.sgd(0.1), jax.random.key(0))
    with pytest.raises(ShapeError, match="returns .loss, fnml.Metrics.*" + said):
        eval_step(loss_fn)(state, jnp.ones(3))


def test_a_loss_in_place_of_its_gradient_is_refused() -> None:
    def loss_fn(params, batch, key):
        mean = Mean.of(batch * params)
        return mean.value, Metrics(mean.weight)

    state = State.create(jnp.float32(1.0), optax.sgd(0.1), jax.random.key(0))
    with pytest.raises(ShapeError, match=r"value_and_grad\(loss_fn, has_aux=True\)"):
        train_step(loss_fn, optax.sgd(0.1))(state, jnp.ones(3))
