"""Compute in a narrow dtype, keep parameters and gradients in a wide one."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fnml.core import ConfigError, LayoutError, Metrics, ShapeError, map_with_name, mask
from fnml.transforms._layout import Laid

PyTree = Any
LossFn = Callable[..., tuple[jax.Array, Metrics]]


class Policy(NamedTuple):
    """Which dtype is used where.

    Attributes:
      params: what parameters are kept in, and gradients come back in.
      compute: what activations and matrix products are in.
      output: what the loss is returned in.

    >>> Policy(compute="float16").compute
    'float16'
    """

    params: Any = "float32"
    compute: Any = "bfloat16"
    output: Any = "float32"


def mixed_precision(
    loss_fn: LossFn,
    policy: Policy | None = None,
    *,
    keep: str | Sequence[str] = (),
    keep_inputs: str | Sequence[str] = (),
) -> LossFn:
    """Compute a loss with parameters and inputs cast to ``policy.compute``.

    The casts are inside the loss, so differentiating it gives gradients in the parameters' own
    dtype, summed over layouts in float32. Integers, keys and options (a model's state) are left
    as they are, and so are metrics: their weights count, which a narrow dtype cannot.

    Law: ``mixed_precision(f, policy)(params, batch, key)`` is ``f`` of the arguments cast by hand,
    bit for bit, and so are its gradients where the cast is inside what is differentiated; with all
    three dtypes those of the arguments it is ``f`` itself.

    Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.1 (a float32 master copy).

    Args:
      loss_fn: a loss, before ``jax.value_and_grad``.
      policy: the dtypes; by default bfloat16 between float32 parameters and a float32 loss.
      keep: path globs of parameters that are not cast, such as ``"**/norm/*"``.
      keep_inputs: path globs of the batch's arrays that are not cast: masks and targets whose
        exact values matter.

    Returns:
      A function with the signature of ``loss_fn``. For float16, differentiate it with
      :func:`scaled_value_and_grad`.

    Raises:
      ConfigError: a dtype of the policy is no float, or a glob matches nothing (when called).
      LayoutError: ``loss_fn`` is a gradient function; the message names the order that works.
      ShapeError: a parameter is not in ``policy.params`` (when called); all of them are listed.

    >>> import jax, jax.numpy as jnp
    >>> def loss_fn(params, batch, key):
    ...     loss = jnp.sum(batch @ params["w"])
    ...     return loss, Metrics(jnp.float32(1.0), {})
    >>> mixed = mixed_precision(loss_fn, Policy(compute="bfloat16"))
    >>> grads = jax.grad(mixed, has_aux=True)({"w": jnp.ones(2)}, jnp.full((1, 2), 1.001), None)[0]
    >>> grads["w"].dtype, grads["w"].tolist()
    (dtype('float32'), [1.0, 1.0])
    """
    params_dtype, compute, output = _dtypes(policy or Policy())
    refuse_gradients(loss_fn, "mixed_precision")

    @functools.wraps(loss_fn)
    def mixed(
        params: PyTree, batch: PyTree, key: jax.Array | None, **options: Any
    ) -> tuple[jax.Array, Metrics]:
        kept = mask(params, keep)
        faults: list[str] = []

        def check(name: str, p: jax.Array, stays: bool) -> None:
            if _is_float(p) and not stays and p.dtype != params_dtype:
                faults.append(f"{name or 'params'}: {p.dtype}")

        map_with_name(check, params, kept)
        if faults:
            raise ShapeError(
                f"the policy keeps parameters in {params_dtype}, got {', '.join(faults)}: cast "
                "them, name them in keep=, or change Policy.params"
            )
        out = loss_fn(
            _cast(params, kept, compute),
            _cast(batch, mask(batch, keep_inputs), compute),
            key,
            **options,
        )
        refuse_gradients(out, "mixed_precision")
        loss, metrics = out
        return loss.astype(output), metrics

    return mixed


def refuse_gradients(given: Any, name: str) -> None:
    """Refuse a gradient function, or what one returned, where a loss is needed.

    Raises:
      LayoutError: the message names the order that works.
    """
    if isinstance(given, Laid) or (isinstance(given, tuple) and isinstance(given[0], tuple)):
        inside = (
            "accumulate(scaled_value_and_grad(loss_fn), n)"
            if name == "scaled_value_and_grad"
            else f"accumulate(jax.value_and_grad({name}(loss_fn, ...), has_aux=True), n)"
        )
        raise LayoutError(
            f"{name} changes how a loss is computed, so it comes before differentiation and "
            f"before any layout: {inside}, not the other way round"
        )


def _dtypes(policy: Policy) -> list[Any]:
    named, faults = policy._asdict(), []
    for field, dtype in named.items():
        try:
            fine = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
        except TypeError:
            fine = False
        if not fine:
            faults.append(f"{field}={dtype!r}")
    if faults:
        raise ConfigError(
            f"a policy's dtypes are floats such as 'float32', 'bfloat16', 'float16'; got "
            f"{', '.join(faults)}"
        )
    return [jnp.dtype(dtype) for dtype in named.values()]


def _is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _cast(tree: PyTree, kept: PyTree, dtype: Any) -> PyTree:
    return jax.tree.map(
        lambda x, stays: x.astype(dtype) if _is_float(x) and not stays else x, tree, kept
    )
