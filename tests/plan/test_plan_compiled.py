"""The real compilers for chips that are not there.

``FNML_TPU_PYTHON`` names a Python with libtpu, ``FNML_CUDA_PYTHON`` one with the CUDA plugin, each
in an environment of its own (CONTRIBUTING.md).
"""

import dataclasses
import math
import os

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType

import fnml
from fnml.core import State
from fnml.models import GPTConfig, gpt
from fnml.plan import Target, parse_target
from fnml.train import next_token, train_step
from fnml.transforms import data_parallel

CONFIG = GPTConfig(vocab=128, width=128, layers=2, heads=1, context=512, dtype="bfloat16", unroll=1)
MODEL, OPTIMIZER = gpt(CONFIG), optax.adam(1e-3)
COUNT = sum(math.prod(p.shape) for p in jax.tree.leaves(MODEL.spec))


def loss_fn(params, batch, key):
    loss = next_token(MODEL.apply(params, batch["tokens"], key=key), batch["targets"])
    return loss.value, fnml.Metrics(loss.weight)


def planned(text, variable, memory=None):
    if variable not in os.environ:
        pytest.skip(f"{variable} is not set: no compiler for {text}")
    target = parse_target(text)
    if memory is not None:
        target = Target(dataclasses.replace(target.chip, memory=memory), target.shape)
    mesh = AbstractMesh((target.chips,), ("data",), axis_types=(AxisType.Auto,))
    grad_fn = data_parallel(jax.value_and_grad(loss_fn, has_aux=True), mesh)
    state = jax.eval_shape(
        lambda: State.create(fnml.init(MODEL.spec, jax.random.key(0)), OPTIMIZER, jax.random.key(1))
    )
    shape = jax.ShapeDtypeStruct((2 * target.chips, 512), jnp.int32)
    return fnml.plan(
        train_step(grad_fn, OPTIMIZER), state, {"tokens": shape, "targets": shape}, target=target
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "variable"), [("v5e:4x4", "FNML_TPU_PYTHON"), ("h100:1x8", "FNML_CUDA_PYTHON")]
)
def test_a_step_is_compiled_with_its_kernels_and_collectives(text, variable):
    plan = planned(text, variable)
    assert plan.fits
    assert plan.memory.parameters == 4 * COUNT
    assert plan.memory.optimizer == 2 * 4 * COUNT + 4
    assert plan.memory.total > 12 * COUNT
    # Attention forward and backward in both layers.
    assert plan.kernels >= 2 * 2
    # The ordered sum: every device hands out its gradients, and gets all of the totals; the TPU
    # compiler gathers them as a sum with zeros.
    moved = {c.kind: c.bytes for c in plan.collectives}
    assert set(moved) in ({"all-to-all", "all-gather"}, {"all-to-all", "all-reduce"})
    assert all(4 * COUNT <= size <= 4.1 * COUNT for size in moved.values()), moved
    assert plan.unbounded == 0
    # Products forward and backward: twice the parameters of the layers and the head for each token,
    # and twice that again; attention comes on top, of a kernel that may compute whole blocks.
    tokens = 2 * 512
    products = 6 * tokens * (COUNT - 128 * 128 - 128 * (2 * 2 + 1))
    assert products < plan.flops < 1.5 * products
    assert math.isclose(plan.seconds, max(plan.roofline))


@pytest.mark.slow
def test_a_tpus_memory_is_measured_against_its_limit():
    plan = planned("v5e:2x2", "FNML_TPU_PYTHON", memory=1 << 20)
    assert not plan.fits
    assert plan.missing == plan.memory.total - (1 << 20)
