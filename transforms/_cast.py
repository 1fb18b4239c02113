"""Keep parameters in another dtype."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fnml.core import ConfigError, Initializer, Model, Param, leaf_names, map_with_name, mask
from fnml.transforms._edited import Edited, QuantizedParam, Targets, is_float, opened

PyTree = Any


def cast(model: Model, dtype: Any, targets: Targets = None, *, compute: Any = None) -> Model:
    """Keep float parameters in ``dtype``: half the memory for ``"bfloat16"``.

    ``apply`` widens them again to the dtype that the spec had, so the model computes as before on
    rounded weights; with ``compute=dtype`` it is given that dtype. To keep the parameters wide
    and compute narrow, use :func:`mixed_precision` instead.

    Laws: ``cast(m, d).apply(p, x) == m.apply(p as stored, widened, x)`` bit for bit, and
    ``init(cast(m, d).spec, key)`` is ``init(m.spec, key)`` rounded to ``d``.

    Args:
      dtype: a float dtype.
      targets: path globs in ``model.spec``, by default every float parameter.
      compute: the dtype that the model computes with; ``None`` for the parameters' own.

    Raises:
      ConfigError: a dtype is no float, a glob matches nothing, or a target holds integers or is
        quantised; all are listed.

    >>> from fnml.core import abstract
    >>> from fnml.models import MLPConfig, mlp
    >>> abstract(cast(mlp(MLPConfig(inputs=2, hidden=(), outputs=1)), "bfloat16").spec)["head"]
    {'bias': ShapeDtypeStruct(shape=(1,), dtype=bfloat16), 'kernel': ShapeDtypeStruct(shape=(2, 1), dtype=bfloat16)}
    """
    for given in (dtype, compute or dtype):
        if not jnp.issubdtype(jnp.dtype(given), jnp.floating):
            raise ConfigError(f"cast got the dtype {given!r}: expected a float such as 'bfloat16'")
    narrow = jnp.dtype(dtype)
    hits = jax.tree.leaves(mask(model.spec, targets or "**"))
    picked = [
        (name, p)
        for name, p, hit in zip(
            leaf_names(model.spec), jax.tree.leaves(model.spec), hits, strict=True
        )
        if hit
    ]
    faults = [
        f"{name}: " + ("it is quantised" if isinstance(p, QuantizedParam) else str(p.dtype))
        for name, p in picked
        if isinstance(p, QuantizedParam) or not is_float(p)
    ]
    if faults and targets is not None:
        raise ConfigError("cast changes floats that are not quantised, not\n" + "\n".join(faults))
    chosen = {name for name, p in picked if is_float(p) and not isinstance(p, QuantizedParam)}
    inner = opened(model)

    def weights(params: PyTree, key: jax.Array | None) -> PyTree:
        wide = map_with_name(
            lambda name, p, x: (
                x.astype(compute or p.dtype) if name in chosen and x.dtype == narrow else x
            ),
            model.spec,
            params,
        )
        return inner.weights(wide, key)

    def store(params: PyTree, key: jax.Array | None) -> PyTree:
        return map_with_name(
            lambda name, x: x.astype(narrow) if name in chosen else x, inner.store(params, key)
        )

    spec = map_with_name(
        lambda name, p: (
            dataclasses.replace(p, dtype=narrow, init=_drawn(p)) if name in chosen else p
        ),
        model.spec,
    )
    return Model(spec, Edited(inner.root, weights, store, (*inner.names, "cast")), model.state)


def _drawn(param: Param) -> Initializer:
    def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return param.init(key, shape, param.dtype).astype(dtype)

    return draw
