"""Several members of a model as one."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from fnml.core import ConfigError, Initializer, Model, Param, mask, nearest

PyTree = Any


def ensemble(
    model: Model,
    members: int,
    *,
    outputs: Literal["mean", "all"] = "mean",
    shared: str | Sequence[str] = (),
    mode: Literal["vmap", "map"] = "vmap",
) -> Model:
    """Make one model of several that differ in their parameters.

    Parameters get a leading axis ``"members"`` of size N, and so does the state of a model that
    has one. Member ``i`` draws its parameter at ``path`` with ``fold_in(key of path, i)``, and its
    random numbers in a call with ``fold_in(key, i)``. All members see the same inputs and other
    keywords. ``shared`` parameters are kept once, without the axis: an ensemble of LoRAs over one
    base is ``ensemble(lora(model), n, shared="base/**")``.

    Law: with ``outputs="all"``, entry ``i`` of what comes out is what ``model.apply`` gives with
    member ``i``'s parameters, state and key: bit for bit with ``mode="map"``, to rounding with
    ``mode="vmap"``. ``"mean"`` is the mean of these over members.

    Source: Lakshminarayanan et al. 2017, arXiv:1612.01474 (members differ by their random start).

    Args:
      members: the number of members, N.
      outputs: ``"mean"`` averages the outputs over members, ``"all"`` keeps the axis. Statistics
        of a model with state always keep it.
      shared: path globs of parameters that all members share.
      mode: ``"vmap"`` computes all members together, ``"map"`` one after the other.

    Raises:
      ConfigError: a number or word is out of range, or a glob matches no parameter.

    >>> from fnml.core import init
    >>> from fnml.models import MLPConfig, mlp
    >>> model = ensemble(mlp(MLPConfig(inputs=2, hidden=(), outputs=3)), 4, outputs="all")
    >>> model.apply(init(model.spec, jax.random.key(0)), jnp.ones((5, 2))).shape
    (4, 5, 3)
    """
    faults = [] if members >= 1 else [f"members={members}: expected 1 or more"]
    faults += [
        f"{name}={word!r}: expected {' or '.join(map(repr, words))}.{nearest(word, words)}"
        for name, word, words in (
            ("outputs", outputs, ("mean", "all")),
            ("mode", mode, ("vmap", "map")),
        )
        if word not in words
    ]
    if faults:
        raise ConfigError("ensemble: " + "; ".join(faults))
    once = mask(model.spec, shared)
    spec = jax.tree.map(lambda p, stays: p if stays else _stacked(p, members), model.spec, once)
    state_spec = jax.tree.map(lambda p: _stacked(p, members), model.state)

    def apply(params: PyTree, *inputs: Any, **options: Any) -> Any:
        own: dict[str, Any] = {}
        if options.get("key") is not None:
            key = options.pop("key")
            own["key"] = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(members))
        if jax.tree.leaves(options.get("state", ())):
            own["state"] = options.pop("state")
        leaves, tree = jax.tree.flatten(params)
        stays = jax.tree.leaves(once)
        varying = [x for x, fixed in zip(leaves, stays, strict=True) if not fixed]

        def member(varying: list[jax.Array], own: dict[str, Any]) -> Any:
            rest = iter(varying)
            mine = [x if fixed else next(rest) for x, fixed in zip(leaves, stays, strict=True)]
            return model.apply(jax.tree.unflatten(tree, mine), *inputs, **options, **own)

        if mode == "vmap":
            out = jax.vmap(member, axis_size=members)(varying, own)
        else:
            out = _in_turn(member, varying, own, members)
        if outputs == "all":
            return out
        if jax.tree.leaves(model.state):
            return _mean(out[0]), out[1]
        return _mean(out)

    return Model(spec, apply, state_spec)


def _in_turn(member: Any, varying: list[jax.Array], own: dict[str, Any], members: int) -> Any:
    return lax.map(
        lambda turn: member(turn[1], turn[2]),
        (jnp.arange(members), varying, own),
    )


def _mean(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.mean(x, 0), tree)


def _stacked(param: Param, members: int) -> Param:
    def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jnp.stack(
            [param.init(jax.random.fold_in(key, i), shape[1:], dtype) for i in range(shape[0])]
        )

    drawn: Initializer = draw
    return dataclasses.replace(
        param, shape=(members, *param.shape), axes=("members", *param.axes), init=drawn
    )
