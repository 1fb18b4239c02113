"""The factor of 8 that data parallelism by hand can put into a gradient without an error.

Each way of averaging over 8 devices is asserted with the ratio that was measured (jax 0.10), right
or wrong, so that a change in JAX is noticed here; ours are right to rounding.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from fnml.core import Mean, Metrics
from fnml.transforms import accumulate, data_parallel, pmap

D, B, N = 8, 32, 5
rng = np.random.default_rng(0)
X, Y, W = rng.normal(size=(B, N)), rng.normal(size=B), rng.normal(size=N)
W32, BATCH = jnp.asarray(W, jnp.float32), (jnp.asarray(X, jnp.float32), jnp.asarray(Y, jnp.float32))


def gradient(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the gradient of the mean squared error at W, in float64."""
    return 2 * (x @ W - y) @ x / len(y)


WHOLE = gradient(X, Y)
OWN = np.stack([gradient(x, y) for x, y in zip(np.split(X, D), np.split(Y, D), strict=True)])


def loss(w: jax.Array, batch: Any) -> jax.Array:
    x, y = batch
    return jnp.mean((x @ w - y) ** 2)


def mean_of_grad(w: jax.Array, batch: Any) -> jax.Array:
    return lax.pmean(jax.grad(loss)(w, batch), "d")


def grad_of_mean(w: jax.Array, batch: Any) -> jax.Array:
    return jax.grad(lambda w: lax.pmean(loss(w, batch), "d"))(w)


def mean_of_grad_of_varying(w: jax.Array, batch: Any) -> jax.Array:
    return mean_of_grad(lax.pcast(w, "d", to="varying"), batch)


def under_pmap(local: Any) -> np.ndarray:
    """Return every device's gradient [D, N]."""
    parts = jax.tree.map(lambda x: x.reshape(D, B // D, *x.shape[1:]), BATCH)
    return np.asarray(jax.pmap(local, "d", in_axes=(None, 0))(W32, parts))


def under_shard_map(local: Any, check_vma: bool) -> np.ndarray:
    mesh = jax.make_mesh((D,), ("d",), axis_types=(AxisType.Auto,))
    run = jax.shard_map(
        lambda w, batch: local(w, batch)[None],
        mesh=mesh,
        in_specs=(P(), P("d")),
        out_specs=P("d"),
        check_vma=check_vma,
    )
    return np.asarray(jax.jit(run)(W32, BATCH))


class Form(NamedTuple):
    """A way of averaging by hand, and what every device then holds."""

    name: str
    found: Any
    expected: np.ndarray


FORMS = [
    Form("pmean of grad, pmap", lambda: under_pmap(mean_of_grad), WHOLE),
    Form("pmean of grad, shard_map unchecked", lambda: under_shard_map(mean_of_grad, False), WHOLE),
    # The gradient with respect to what all devices share is their sum already.
    Form(
        "pmean of grad, shard_map checked", lambda: under_shard_map(mean_of_grad, True), D * WHOLE
    ),
    # The transpose of the mean hands each device the gradient of its own shard: nothing is shared.
    Form("grad of pmean, pmap", lambda: under_pmap(grad_of_mean), OWN),
    Form("grad of pmean, shard_map unchecked", lambda: under_shard_map(grad_of_mean, False), OWN),
    Form("grad of pmean, shard_map checked", lambda: under_shard_map(grad_of_mean, True), WHOLE),
    *(
        Form(
            f"pmean of grad of varying params, shard_map {name}",
            lambda check=check: under_shard_map(mean_of_grad_of_varying, check),
            WHOLE,
        )
        for name, check in (("checked", True), ("unchecked", False))
    ),
]


@pytest.mark.parametrize("form", FORMS, ids=[form.name for form in FORMS])
def test_what_each_form_by_hand_gives(form):
    found, expected = form.found(), np.broadcast_to(form.expected, (D, N))
    ratios = np.linalg.norm(found, axis=1) / np.linalg.norm(WHOLE)
    np.testing.assert_allclose(
        ratios, np.linalg.norm(expected, axis=1) / np.linalg.norm(WHOLE), rtol=1e-6
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_wrong_forms_are_far_off():
    ratios = np.linalg.norm(OWN, axis=1) / np.linalg.norm(WHOLE)
    assert np.abs(ratios - 1).max() > 0.5
    assert np.linalg.norm(OWN - WHOLE, axis=1).min() > 0.1 * np.linalg.norm(WHOLE)


def loss_fn(w: jax.Array, batch: Any, key: jax.Array) -> tuple[jax.Array, Metrics]:
    x, y = batch
    error = Mean.of((x @ w - y) ** 2)
    return error.value, Metrics(error.weight)


GRAD = jax.value_and_grad(loss_fn, has_aux=True)


@pytest.mark.parametrize("reduce", ["exact", "fast"])
@pytest.mark.parametrize("inner", [1, 2])
@pytest.mark.parametrize("lay", [data_parallel, pmap])
def test_ours_have_the_gradient_of_one_device(lay, inner, reduce):
    mesh = jax.make_mesh((D,), ("data",), axis_types=(AxisType.Auto,))
    where = mesh if lay is data_parallel else jax.devices()
    grad_fn = lay(accumulate(GRAD, inner) if inner > 1 else GRAD, where, reduce=reduce)
    _, found = jax.jit(grad_fn)(W32, BATCH, jax.random.key(0))
    ratio = np.linalg.norm(found) / np.linalg.norm(WHOLE)
    assert abs(ratio - 1) < 1e-6
    np.testing.assert_allclose(found, WHOLE, rtol=1e-5, atol=1e-6)
