"""Ways of dividing a training step over devices, built small, to be compiled for chips not here.

A case is a name and a function of the devices: it returns what to compile and the shapes of its
arguments. ``compile_parallel_forms.py`` compiles them in Pythons that have little beside JAX.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fnml.core import Metrics, State, count, init, make_mesh, shardings
from fnml.models import GPTConfig, gpt
from fnml.parallel import DATA, EXPERT, FSDP, TENSOR, combine
from fnml.train import cross_entropy, train_step
from fnml.transforms import data_parallel, shard, state_shardings

B, T, V = 64, 128, 256
BATCH_AXES = ("data", "expert")
# One loop over layers, and activations that are larger than a layer's parameters.
DENSE = GPTConfig(vocab=V, width=128, layers=2, heads=4, context=T, mlp_width=256, unroll=1)
EXPERTS = GPTConfig(
    vocab=V, width=128, layers=1, heads=4, context=T, mlp_width=256, unroll=1, experts=4
)
OPTIMIZER = optax.adamw(1e-3)


class Compilable(NamedTuple):
    """What is compiled: a function, and the shapes of its arguments with their places."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def _grad_fn(config: GPTConfig, residual: P | None) -> Any:
    model = gpt(config, residual=residual)

    def loss_fn(params: Any, batch: Any, key: Any) -> Any:
        loss = cross_entropy(model.apply(params, batch["x"]), batch["y"])
        return loss.value, Metrics(loss.weight)

    return model, jax.value_and_grad(loss_fn, has_aux=True)


def _described(tree: Any, places: Any) -> Any:
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, places
    )


def _batch(where: NamedSharding) -> Any:
    return {name: jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=where) for name in "xy"}


def by_rules(
    axes: dict[str, int], rules: Any, config: GPTConfig = DENSE, placed: bool = True
) -> Callable[[Sequence[Any]], Compilable]:
    """Return a whole step that the compiler divides; without ``placed``, activations lie anyhow."""

    def build(devices: Sequence[Any]) -> Compilable:
        mesh = make_mesh(axes, devices)
        model, grad_fn = _grad_fn(config, P(BATCH_AXES) if placed else None)

        def start(key: jax.Array) -> State:
            return State.create(init(model.spec, key), OPTIMIZER, key)

        state = jax.eval_shape(start, jax.random.key(0))
        places = state_shardings(state, shardings(model.spec, mesh, rules))
        divided = P(tuple(axis for axis in BATCH_AXES if axis in axes) or None)
        step = shard(train_step(grad_fn, OPTIMIZER), mesh, places, divided)
        return Compilable(step, (_described(state, places), _batch(NamedSharding(mesh, divided))))

    return build


def by_mapping(lay: Callable[[Any, Any], Any]) -> Callable[[Sequence[Any]], Compilable]:
    """Return the gradient of a function that maps itself: ``lay(grad_fn, mesh)``."""

    def build(devices: Sequence[Any]) -> Compilable:
        mesh = make_mesh({"data": -1}, devices)
        everywhere = NamedSharding(mesh, P())
        model, grad_fn = _grad_fn(DENSE, None)
        params, key = jax.eval_shape(
            lambda: (init(model.spec, jax.random.key(0)), jax.random.key(0))
        )
        params, key = _described((params, key), jax.tree.map(lambda x: everywhere, (params, key)))
        return Compilable(lay(grad_fn, mesh), (params, _batch(everywhere), key))

    return build


def _fast(grad_fn: Any, mesh: Any) -> Any:
    return data_parallel(grad_fn, mesh, reduce="fast")


CASES: list[tuple[str, Callable[[Sequence[Any]], Compilable]]] = [
    ("data", by_rules({"data": -1}, DATA)),
    ("fsdp", by_rules({"data": -1}, FSDP)),
    ("fsdp, activations anyhow", by_rules({"data": -1}, FSDP, placed=False)),
    ("data x tensor", by_rules({"data": -1, "model": 4}, TENSOR)),
    ("fsdp x tensor", by_rules({"data": -1, "model": 4}, combine(FSDP, TENSOR))),
    ("fsdp x expert", by_rules({"data": -1, "expert": 4}, combine(FSDP, EXPERT), EXPERTS)),
    ("data_parallel exact", by_mapping(data_parallel)),
    ("data_parallel fast", by_mapping(_fast)),
]

PARAM_BYTES = 4 * count(gpt(DENSE).spec)
