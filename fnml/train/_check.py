"""Refuse a step that cannot run, before anything is compiled."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fnml.core import FnmlError, Mean, ShapeError, path_name

PyTree = Any


def _describe(tree: PyTree) -> dict[str, str]:
    return {
        path_name(path) or "value": f"{x.dtype}{list(x.shape)}"
        for path, x in jax.tree.leaves_with_path(tree)
    }


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    dtype = x.dtype if hasattr(x, "dtype") else jnp.result_type(x)
    if not jnp.issubdtype(dtype, jax.dtypes.extended):
        # What jit makes of a host array: 64 bits become 32 unless JAX is told otherwise.
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    return jax.ShapeDtypeStruct(jnp.shape(x), dtype)


def check_step(step: Callable[..., Any], state: PyTree, batch: PyTree) -> dict[str, Mean]:
    """Trace ``step`` on shapes alone; return the shapes of its metrics.

    Raises:
      ShapeError: the step cannot be traced on this batch, does not return ``(state, metrics)``,
        or returns a state of other shapes, dtypes or structure than it was given. All differences
        are listed by path.
    """
    state, batch = jax.tree.map(_shape, (state, batch))
    try:
        out = jax.eval_shape(step, state, batch)
    except FnmlError:
        raise
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        listing = ", ".join(f"{name}: {shape}" for name, shape in _describe(batch).items())
        reason = str(error).strip().split("\n")[0] or "no message"
        raise ShapeError(
            f"the step cannot be traced on a batch of ({listing}): {type(error).__name__}: {reason}"
        ) from error
    if not (isinstance(out, tuple) and len(out) == 2):
        raise ShapeError(f"a step returns (state, metrics), got {type(out).__name__}")
    new, metrics = out
    before, after = _describe(state), _describe(new)
    faults = [
        f"{name}: {before.get(name, 'absent')} before, {after.get(name, 'absent')} after"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    if not faults and jax.tree.structure(state) != jax.tree.structure(new):  # type: ignore[operator]
        faults.append(f"{jax.tree.structure(state)} before, {jax.tree.structure(new)} after")
    if faults:
        raise ShapeError("a step has to return a state like the one given:\n" + "\n".join(faults))
    wrong = not isinstance(metrics, dict) or not all(isinstance(m, Mean) for m in metrics.values())
    if wrong or "loss" not in metrics:
        raise ShapeError(
            "a step's metrics are a dict of fnml.Mean with 'loss' among them, got "
            + str(
                {name: type(m).__name__ for name, m in metrics.items()}
                if isinstance(metrics, dict)
                else type(metrics).__name__
            )
        )
    bad = {name: m.total.shape for name, m in metrics.items() if m.total.shape or m.weight.shape}
    if bad:
        raise ShapeError(f"metrics are scalars, got shapes {bad}: sum them into Mean.of(values)")
    return metrics
