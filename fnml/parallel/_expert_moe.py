"""A mixture of experts that live on different devices."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fnml.core import LayoutError, axis_tuple, mapped_axes, refuse_mapped
from fnml.models import Routes, route, run_experts

PyTree = Any
Experts = Callable[..., tuple[jax.Array, Routes]]


def expert_moe(
    mesh: Mesh,
    axis: str = "expert",
    *,
    batch: str | Sequence[str] | None = None,
    sequence: str | Sequence[str] | None = None,
) -> Experts:
    """Make the :func:`fnml.models.moe` of experts that lie divided along a mesh axis.

    Each of the N devices along ``axis`` holds E / N experts and runs those on the tokens of its part
    of the batch that chose them; the outputs are added up over the axis. So any routing is computed
    whole, and no token is dropped. Weights and products are divided by N. Tokens are not: each
    device along the axis has the activations of all tokens of its part of the batch.

    Give it to :func:`fnml.models.gpt` as ``experts=``, with parameters placed by the rules
    ``fnml.parallel.EXPERT``.

    Law: ``expert_moe(mesh)(x, params) == moe(x, params)`` to rounding, gradients too; the routes have
    the same bits.

    Args:
      mesh: the device mesh.
      axis: the mesh axis of the experts.
      batch: the mesh axes that divide the first axis of ``x``, if any.
      sequence: the mesh axes that divide its second axis, if any.

    Axes of the mesh that are not named stay with the compiler, as under ``jit``.

    Raises:
      LayoutError: the mesh lacks an axis, or one is named twice; when called: the axes do not divide
        ``x`` or the number of experts, or this is inside of a ``shard_map``.

    Source: Lepikhin et al. 2020, arXiv:2006.16668, section 3 (experts on different devices).

    >>> from fnml.core import make_mesh
    >>> weights = {"gate": jnp.ones((4, 3, 5)), "up": jnp.ones((4, 3, 5)), "down": jnp.ones((4, 5, 3))}
    >>> moe = expert_moe(make_mesh({"expert": 1}, jax.devices()[:1]))
    >>> moe(jnp.ones((2, 7, 3)), {"router": jnp.ones((3, 4)), **weights})[0].shape
    (2, 7, 3)
    """
    roles = {"axis": axis, "batch": batch, "sequence": sequence}
    mapped = mapped_axes("expert_moe", mesh, roles)
    devices, over = mesh.shape[axis], (axis_tuple(batch), axis_tuple(sequence))

    def local(x: jax.Array, weights: PyTree, chosen: jax.Array, shares: jax.Array) -> jax.Array:
        here = weights["gate"].shape[0]
        chosen, shares = (y.reshape(-1, y.shape[-1]) for y in (chosen, shares))
        own = chosen - lax.axis_index(axis) * here
        own = jnp.where((own >= 0) & (own < here), own, here)
        hit = own.reshape(-1, 1) == jnp.arange(here, dtype=own.dtype)[None, :]
        sizes = jnp.sum(hit, axis=0, dtype=jnp.int32)
        y = run_experts(x.reshape(-1, x.shape[-1]), weights, own, shares, sizes)
        return lax.psum(y.reshape(x.shape), axis)

    def moe(
        x: jax.Array, params: PyTree, *, experts_per_token: int = 2
    ) -> tuple[jax.Array, Routes]:
        refuse_mapped("expert_moe", "divide the batch with expert_moe(..., batch='data') under jit")
        check(x, params["gate"].shape[0])
        routes = route(x.reshape(-1, x.shape[-1]), params["router"], experts_per_token)
        # Like x, so that they can be cut along the same axes.
        chosen, shares = (
            y.reshape(*x.shape[:-1], experts_per_token) for y in (routes.experts, routes.weights)
        )
        rows = P(*over[: x.ndim - 1])
        y = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(rows, P(axis), rows, rows),
            out_specs=rows,
            axis_names=set(mapped),
            # The scans and kernels inside know nothing of varying axes.
            check_vma=False,
        )(x, {name: params[name] for name in ("gate", "up", "down")}, chosen, shares)
        return y, routes

    def check(x: jax.Array, count: int) -> None:
        faults = []
        if count % devices:
            faults.append(f"{count} experts, which {devices} devices along {axis!r} do not divide")
        for i, names in enumerate(over):
            ways = math.prod(mesh.shape[name] for name in names)
            if names and (i >= x.ndim - 1 or x.shape[i] % ways):
                faults.append(
                    f"x {x.shape}, of which {ways} devices along {names} do not divide axis {i}"
                )
        if faults:
            raise LayoutError("expert_moe got " + "; ".join(faults))

    return moe
