"""Small programs that between them use every primitive with a body."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType


@jax.custom_vjp
def square(x):
    return checkpoint_name(x * x, "squared")


square.defvjp(lambda x: (square(x), x), lambda x, g: (2 * x * g,))


@jax.custom_jvp
def halve(x):
    return x / 2


halve.defjvp(lambda primals, tangents: (halve(primals[0]), tangents[0] / 2))


def layer(x, w):
    with jax.named_scope("mlp"):
        hidden = checkpoint_name(jnp.tanh(x @ w), "hidden")
    return x + hidden, jnp.sum(hidden)


def loops(ws, x):
    return lax.scan(layer, x, ws)[0]


def backwards(ws, x):
    return lax.scan(layer, x, ws, reverse=True)[1]


def turns(ws, x):
    return lax.while_loop(
        lambda c: jnp.sum(c) < 100.0, lambda c: checkpoint_name(c * c + 1.0, "grown"), x
    )


def branches(ws, x):
    return lax.cond(
        jnp.sum(x) > 0, lambda x: checkpoint_name(jnp.sin(x), "taken"), lambda x: -x, x @ ws[0]
    )


def remats(ws, x):
    return jax.checkpoint(lambda x: loops(ws, jnp.sin(x)))(x)


def customs(ws, x):
    return halve(square(x @ ws[0])) + jax.nn.relu(x)


def jits(ws, x):
    return jax.jit(lambda x: jax.jit(jnp.cos)(x) @ ws[1])(x)


def maps(ws, x):
    return jax.vmap(loops, in_axes=(None, 0))(ws, x[:, None])


def shards(ws, x):
    kind = (AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("data",), axis_types=kind, devices=jax.devices()[:2])

    def local(x):
        return lax.psum(checkpoint_name(jnp.sum(jnp.cos(x @ ws[0]), 0), "local"), "data")

    spec = jax.P("data")
    return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=jax.P())(x)


PROGRAMS = {
    f.__name__: f for f in (loops, backwards, turns, branches, remats, customs, jits, maps, shards)
}
DIFFERENTIABLE = [name for name in PROGRAMS if name != "turns"]
WS = jnp.linspace(-0.7, 0.9, 48).reshape(3, 4, 4)
X = jnp.linspace(0.1, 0.9, 8).reshape(2, 4)
