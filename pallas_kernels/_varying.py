"""Arrays that differ between devices as others do, for the loops of a ``shard_map``."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def zeros(shape: Sequence[int], dtype: Any, like: jax.Array) -> jax.Array:
    """Return zeros to begin a sum with: inside ``shard_map`` they vary where ``like`` does.

    A loop whose sums begin the same on all devices and end differently is refused there.
    """
    full, varies = jnp.zeros(shape, dtype), varying(like)
    return lax.pcast(full, varies, to="varying") if varies else full


def varying(x: jax.Array) -> tuple[str, ...]:
    """Return the axes of a ``shard_map`` along which ``x`` is known to vary."""
    of = jax.typeof(x)
    kind = getattr(of, "manual_axis_type", None)
    return tuple(kind.varying) if kind else tuple(getattr(of, "vma", ()))
