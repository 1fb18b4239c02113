"""A GPT divided over devices by pipeline, ring and experts has the gradients of one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from mapped_forms import FORMS, SMALL, configured, divided, loss_and_grads

from fnml.core import init, make_mesh
from fnml.models import gpt, linear
from fnml.plan import collectives

TOKENS = jax.random.randint(jax.random.key(1), (8, 16), 0, SMALL.vocab)


@pytest.fixture(scope="module")
def alone():
    """Parameters, loss and gradients on one device, with and without experts."""
    found = {}
    for experts in (None, 4):
        config = configured(next(f for f in FORMS.values() if f.experts == experts), SMALL)
        model = gpt(config)
        params = init(model.spec, jax.random.key(0))
        found[experts] = params, jax.jit(loss_and_grads(model, config))(params, TOKENS)
    return found


def flat(tree):
    return np.concatenate([np.float64(x).ravel() for x in jax.tree.leaves(tree)])


@pytest.mark.parametrize("name", FORMS)
def test_loss_and_gradients_are_those_of_one_device(name, alone):
    form = FORMS[name]
    params, (loss, grads) = alone[form.experts]
    _, run, places = divided(form, SMALL, jax.devices())
    placed, tokens = jax.device_put(params, places[0]), jax.device_put(TOKENS, places[1])
    compiled = jax.jit(run).lower(placed, tokens).compile()
    got_loss, got = compiled(placed, tokens)
    # Float32 sums in another order: a few ulps of 1.2e-7, relative in norm.
    assert abs(got_loss - loss) <= 1e-6 * loss
    a, b = flat(got), flat(grads)
    assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b)
    assert abs(np.linalg.norm(a) / np.linalg.norm(b) - 1) <= 1e-5
    assert form.sends in {c.kind for c in collectives(compiled.as_text())}


def test_a_layers_dropout_draws_apart_for_each_microbatch():
    form, config = FORMS["pipeline"], dataclasses.replace(SMALL, dropout=0.5)
    model, _, _ = divided(form, config, jax.devices())
    params = init(model.spec, jax.random.key(0))
    rows = jnp.broadcast_to(TOKENS[:1], TOKENS.shape)
    key = jax.random.key(7)
    # Without the embedding's own dropout, equal examples differ by their micro-batch's keys alone.
    run = jax.jit(lambda params: model.apply(params, rows, key=key))
    logits = np.asarray(run(params))
    assert not np.array_equal(logits[0], logits[2])
    np.testing.assert_array_equal(logits, run(params))


def test_a_divided_sequence_stays_divided_through_a_linear_layer():
    """As rows of one matrix [B * T, D] it could not: whoever multiplies would gather it first."""
    mesh = make_mesh({"data": 2, "sequence": 4})

    def loss(kernel, x, bias):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jnp.sum(jnp.sin(linear(x, kernel, bias)))

    def shape(*sizes, spec):
        return jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=NamedSharding(mesh, spec))

    tokens = P("data", "sequence")
    arguments = shape(16, 8, spec=P()), shape(4, 64, 16, spec=tokens), shape(8, spec=P())
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arguments).compile()
    assert {c.kind for c in collectives(compiled.as_text())} == {"all-reduce"}
