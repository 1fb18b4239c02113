"""fnml: the zoo's models, as its documentation trains them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax_rows import layers
from problems import Problem

import fnml
from fnml import Mean, Metrics, State, keep_memory, models, train, transforms

PyTree = Any


def versions() -> dict[str, str]:
    return {"fnml": fnml.__version__, "jax": jax.__version__}


def environment(row: str, variant: str) -> dict[str, str]:
    """Return what ``keep_memory`` asks a program to be started with."""
    return {} if row == "digits_mlp" else {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}


def on_device(batches: list) -> list:
    return [jax.device_put(batch) for batch in batches]


def value(metrics: dict[str, Mean]) -> float:
    """Return the loss of the last step, read as ``fit`` does: the mean is taken on the host."""
    loss = jax.device_get(metrics["loss"])
    return float(np.ravel(loss.total / loss.weight)[-1])


def steps_per_call(variant: str) -> int:
    return 10 if "fused" in variant else 1


def training(
    problem: Problem,
    params: PyTree,
    loss_fn: Callable[..., Any],
    variant: str,
    model_state: PyTree = (),
) -> tuple[State, Callable]:
    """Return the state and the donating step of a loss function; a block of steps if "fused"."""
    rule = train.adamw(**problem.adamw._asdict())
    step = train.train_step(jax.value_and_grad(loss_fn, has_aux=True), rule)
    if "native" in variant:
        step = transforms.native(step)
    params = jax.tree.map(jnp.asarray, params)
    state = State.create(params, rule, jax.random.key(0), model_state)
    if "fused" in variant:
        step = transforms.fuse(step, steps_per_call(variant))
    return state, jax.jit(step, donate_argnums=0)


def _gpt(problem: Problem, variant: str) -> tuple[State, Callable]:
    keep_memory()
    model = models.gpt(models.GPTConfig(**problem.config, stacked=False))
    weights = problem.weights | {"layers": layers(problem)}
    params = jax.tree.map(lambda p, x: x.reshape(p.shape), model.spec, weights)

    def loss_fn(params: PyTree, batch: Any, key: jax.Array) -> tuple[jax.Array, Metrics]:
        tokens, targets = batch
        loss = train.next_token(model.apply(params, tokens), targets)
        return loss.value, Metrics(loss.weight)

    return training(problem, params, loss_fn, variant)


gpt_small = gpt_medium = _gpt


def bert(problem: Problem, variant: str) -> tuple[PyTree, Callable]:
    keep_memory()
    model = models.encoder(models.EncoderConfig(**problem.config, types=2, stacked=False))
    weights = problem.weights | {"layers": layers(problem)}
    params = jax.tree.map(lambda p, x: jnp.asarray(x.reshape(p.shape)), model.spec, weights)

    apply = transforms.native(model.apply) if variant == "native" else model.apply

    @jax.jit
    def forward(params: PyTree, batch: Any) -> dict[str, Mean]:
        tokens, types, probe = batch
        total = jnp.vdot(apply(params, tokens, types), probe)
        return {"loss": Mean(total, jnp.ones(()))}

    return params, lambda params, batch: (params, forward(params, batch))


def _classifier(apply: Callable[..., Any]) -> Callable[..., Any]:
    def loss_fn(
        params: PyTree, batch: Any, key: jax.Array, state: PyTree = ()
    ) -> tuple[jax.Array, Metrics]:
        images, labels = batch
        logits, stats = apply(params, images, state)
        loss = train.cross_entropy(logits, labels)
        return loss.value, Metrics(loss.weight, stats=stats)

    return loss_fn


def digits_mlp(problem: Problem, variant: str) -> tuple[State, Callable]:
    inputs, *hidden, outputs = problem.config["sizes"]
    config = models.MLPConfig(
        inputs=inputs, hidden=tuple(hidden), outputs=outputs, activation="relu"
    )
    model = models.mlp(config)
    *first, last = problem.weights["layers"]
    params = {"hidden": first, "head": last}
    classifier = _classifier(lambda params, x, state: (model.apply(params, x), ()))
    return training(problem, params, classifier, variant)


def cnn(problem: Problem, variant: str) -> tuple[State, Callable]:
    keep_memory()

    def apply(params: PyTree, x: jax.Array, state: PyTree) -> tuple[jax.Array, PyTree]:
        for layer in params["convolutions"]:
            x = models.conv2d(x, layer["kernel"]) + layer["bias"]
            x = models.max_pool2d(jax.nn.relu(x))
        first, last = params["layers"]
        x = jax.nn.relu(models.linear(x.reshape(len(x), -1), **first))
        return models.linear(x, **last), ()

    return training(problem, problem.weights, _classifier(apply), variant)


def resnet(problem: Problem, variant: str) -> tuple[State, Callable]:
    keep_memory()
    model = models.resnet(models.ResNetConfig(classes=10, **problem.config))

    def apply(params: PyTree, x: jax.Array, state: PyTree) -> tuple[jax.Array, PyTree]:
        return model.apply(params, x, state=state, train=True)

    state = fnml.init(model.state, jax.random.key(0))
    return training(problem, problem.weights, _classifier(apply), variant, state)
