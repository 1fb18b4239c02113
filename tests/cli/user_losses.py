"""Modules as a user writes them, for the commands that check a loss."""

HEAD = """
import jax, jax.numpy as jnp, numpy as np
from fnml import Mean, Metrics

def example():
    rng = np.random.default_rng(0)
    params = {"hidden": {"kernel": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)},
              "scale": jnp.ones(4)}
    batch = {"x": rng.normal(size=(8, 3)).astype(np.float32),
             "mask": (np.arange(8) % 4 < 3).astype(np.float32)}
    batch["mask"][:3] = 0
    return params, batch

def outputs(params, batch):
    return jnp.sum(jnp.tanh(batch["x"] @ params["hidden"]["kernel"]) * params["scale"][None], 1)

def squares(params, batch):
    return (outputs(params, batch) - 1.0) ** 2
"""

GOOD = (
    HEAD
    + """
def loss_fn(params, batch, key):
    error = Mean.of(squares(params, batch), batch["mask"])
    return error.value, Metrics(error.weight, {"error": error})
"""
)

# A mean over unmasked examples that says it is one over all.
NAIVE = (
    HEAD
    + """
def loss_fn(params, batch, key):
    error = Mean.of(squares(params, batch), batch["mask"])
    return error.value, Metrics(jnp.float32(batch["mask"].size))
"""
)

IMPURE = (
    HEAD
    + """
calls = 0

def loss_fn(params, batch, key):
    global calls
    calls += 1
    error = Mean.of(squares(params, batch) + 0.1 * calls, batch["mask"])
    return error.value, Metrics(error.weight)
"""
)

DRAWING = (
    HEAD
    + """
def loss_fn(params, batch, key):
    noise = jax.random.normal(key, batch["mask"].shape)
    error = Mean.of(squares(params, batch) * (1.0 + 0.1 * noise), batch["mask"])
    return error.value, Metrics(error.weight)
"""
)

WRONG_VJP = (
    HEAD
    + """
@jax.custom_vjp
def product(x, scale):
    return x * scale[None]

def forward(x, scale):
    return product(x, scale), (x, scale)

def backward(saved, g):
    x, scale = saved
    return g * scale[None], 1.001 * jnp.sum(g * x, 0)

product.defvjp(forward, backward)

def outputs(params, batch):
    return jnp.sum(product(jnp.tanh(batch["x"] @ params["hidden"]["kernel"]), params["scale"]), 1)

def loss_fn(params, batch, key):
    error = Mean.of(squares(params, batch), batch["mask"])
    return error.value, Metrics(error.weight)
"""
)
