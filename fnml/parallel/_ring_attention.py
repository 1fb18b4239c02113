"""Attention over sequences that are divided over devices."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fnml.core import LayoutError, ShapeError, axis_tuple, mapped_axes, refuse_mapped
from fnml.pallas_kernels.attention import ring_attention as on_device

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def ring_attention(
    mesh: Mesh,
    axis: str = "sequence",
    *,
    batch: str | Sequence[str] | None = None,
    heads: str | Sequence[str] | None = None,
) -> Attention:
    """Make the causal attention of sequences that lie divided along a mesh axis.

    What comes back takes q [B, T, H, D] and k, v [B, T, K, D], as
    :func:`fnml.models.causal_attention` does, and each of the N devices computes T / N queries. Keys
    and values go around the ring of devices; what queries have read is merged by the logarithms of
    its sums. Memory is linear in T / N, backwards too. Every device computes equally many pairs: for
    that, each exchanges half its rows with another one first, and back in the end.

    Give it to :func:`fnml.models.gpt` as ``attention=`` and divide the tokens along the axis,
    ``P("data", "sequence")``: all else in the model treats positions one by one, and the compiler
    leaves it where the tokens are. Rotary positions stay those of the whole sequence.

    Law: ``ring_attention(mesh)(q, k, v) == causal_attention(q, k, v)`` to rounding, gradients too;
    changing keys and values at positions > t changes no bit of the outputs <= t.

    Args:
      mesh: the device mesh.
      axis: the mesh axis of the sequence.
      batch: the mesh axes that divide the batch, if any.
      heads: the mesh axes that divide the heads, if any (tensor parallelism).

    The axes of the mesh that are not named stay with the compiler, as under ``jit``; hand-written
    kernels run only where none of these has more than one device.

    Raises:
      LayoutError: the mesh lacks an axis, or one is named twice; when called: T is no multiple of
        2 N, the axes do not divide B, H or K, or this is inside of a ``shard_map``.
      ShapeError: the shapes or dtypes do not fit together; when called.

    Source: Liu, Zaharia and Abbeel 2023, arXiv:2310.01889, algorithm 1.

    >>> import jax.numpy as jnp
    >>> from fnml.core import make_mesh
    >>> attention = ring_attention(make_mesh({"sequence": 1}, jax.devices()[:1]))
    >>> attention(*[jnp.ones((2, 6, 4, 8))] * 3).shape
    (2, 6, 4, 8)
    """
    mapped = mapped_axes("ring_attention", mesh, {"axis": axis, "batch": batch, "heads": heads})
    over = axis_tuple(batch), (axis,), axis_tuple(heads)
    ways = [math.prod(mesh.shape[name] for name in names) for names in over]
    # check_vma=False: the scans and kernels inside know nothing of varying axes.
    around = jax.shard_map(
        functools.partial(on_device, axis=axis, size=mesh.shape[axis]),
        mesh=mesh,
        in_specs=P(*over),
        out_specs=P(*over),
        axis_names=set(mapped),
        check_vma=False,
    )

    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        refuse_mapped(
            "ring_attention", "divide the batch with ring_attention(..., batch='data') under jit"
        )
        fits = (
            q.ndim == k.ndim == 4
            and k.shape == v.shape
            and q.shape[:2] == k.shape[:2]
            and q.shape[3] == k.shape[3]
            and q.shape[2] % k.shape[2] == 0
            and q.dtype == k.dtype == v.dtype
        )
        if not fits:
            raise ShapeError(
                f"ring_attention got q {q.dtype} {q.shape}, k {k.dtype} {k.shape}, v {v.dtype} "
                f"{v.shape}: expected one dtype, q [B, T, H, D] and k, v [B, T, K, D] with H a "
                "multiple of K"
            )
        sizes = (
            ("B", k.shape[0], ways[0]),
            ("T", k.shape[1], 2 * ways[1]),
            ("K", k.shape[2], ways[2]),
        )
        faults = [
            f"{name}={size} is no multiple of {count}"
            for name, size, count in sizes
            if size % count
        ]
        if faults:
            raise LayoutError(
                f"ring_attention of q {q.shape} and k, v {k.shape} on {ways[0]} x {ways[1]} x "
                f"{ways[2]} devices along {over[0]}, {over[1]}, {over[2]}: {'; '.join(faults)} (the "
                "sequence is cut into two parts for each device)"
            )
        return around(q, k, v)

    return attention
