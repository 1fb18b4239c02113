"""flax.linen modules as models, and back."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from fnml.core import ConfigError, FnmlError, Model, ShapeError, fold_name
from fnml.interop._draw import drawers
from fnml.interop._guest import (
    Flags,
    check_state,
    check_values,
    describe,
    given_state,
    make_param,
    read_flags,
    written,
)

if TYPE_CHECKING:
    from flax import linen

PyTree = Any


def from_linen(
    module: "linen.Module",
    *example: Any,
    key: jax.Array | None = None,
    rngs: Sequence[str] = ("dropout",),
    method: str | None = None,
    flags: Flags | None = None,
    **options: Any,
) -> tuple[Model, PyTree]:
    """Make a model of a flax linen module.

    ``model.apply(params, *inputs, key=None, train=None, **options)`` runs the module. ``train``
    is by default whether there is a ``key``. A module with collections beside ``"params"``, such
    as ``"batch_stats"``, is called with ``state=`` and returns ``(outputs, stats)``, ``stats``
    being ``()`` unless ``train``. Stream ``name`` of random numbers has the key
    ``fold_name(key, name)``.

    ``model.spec`` has the tree of the module's parameters; names given with
    ``nn.with_partitioning`` are the axes. ``model.state`` is ``{collection: tree}``.

    Laws: ``apply`` has the bits of ``module.apply``, compiled alike. ``params`` are those of
    ``jax.jit(module.init)`` with ``key`` as the stream ``"params"``. ``init(model.spec, k)`` draws
    the leaf at ``path`` as the module does from ``fold_name(k, path)``. ``stats`` are the
    collections as the module wrote them, with weight 1: ``train_step(..., momentum=0.0)`` puts
    exactly them into the state, so that BatchNorm's own ``momentum`` counts (any other would
    average twice). Over several logical shards it is their mean.

    Args:
      module: the unbound module.
      *example: arguments of a call: arrays, or :class:`jax.ShapeDtypeStruct` where the
        initialisation does not depend on values.
      key: draws ``params``; by default ``jax.random.key(0)``.
      rngs: the streams that the module draws from when it is applied.
      method: the name of the method to call, by default ``__call__``.
      flags: ``flags(train)`` returns the keywords that tell the method whether it trains. By
        default those of ``train``, ``training``, ``is_training``, ``deterministic`` and
        ``use_running_average`` that it takes and that are not fixed as attributes.
      **options: keywords for every call; a call can override them.

    Raises:
      ConfigError: the module keeps state that is no float, or draws from a stream that is not in
        ``rngs`` or has no key (when called).
      ShapeError: the module cannot be called on the example; the state is not the model's (when
        called).

    >>> from flax import linen as nn
    >>> model, params = from_linen(nn.Dense(3), jnp.ones((1, 2)))
    >>> model.spec["kernel"].shape, model.apply(params, jnp.ones((5, 2))).shape
    ((2, 3), (5, 3))
    """
    from flax import errors
    from flax.core import meta

    key = jax.random.key(0) if key is None else key
    what = type(module).__name__
    if isinstance(rngs, str) or "params" in rngs:
        raise ConfigError(
            f"rngs lists the streams that {what} draws from when applied, without 'params', as in "
            f"rngs=('dropout',); got {rngs!r}"
        )
    function = getattr(module, method or "__call__")
    told = read_flags(module, function) if flags is None else flags

    def initialise(key: jax.Array, *inputs: Any) -> PyTree:
        streams = {"params": key, **{name: fold_name(key, name) for name in rngs}}
        keywords = {**told(False), **options}
        return dict(module.init(streams, *inputs, method=method, **keywords))

    def concrete() -> Any:
        return jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x,
            example,
        )

    def unboxed(key: jax.Array) -> PyTree:
        return meta.unbox(initialise(key, *concrete()))

    try:
        boxed = jax.eval_shape(initialise, key, *example)
    except FnmlError:
        raise
    except (TypeError, ValueError, AttributeError, IndexError, errors.FlaxError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ShapeError(
            f"{what} cannot be called on the example ({describe(example)}): "
            f"{type(error).__name__}: {reason}"
        ) from error
    boxes, tree = jax.tree.flatten(boxed, is_leaf=lambda x: isinstance(x, meta.AxisMetadata))
    shapes = [meta.unbox(box) for box in boxes]
    # A box may also hold no names of axes.
    names = [getattr(box, "names", None) for box in boxes]
    inits = drawers(unboxed, len(boxes))
    spec = jax.tree.unflatten(tree, list(map(make_param, shapes, names, inits)))
    collections = {name: spec[name] for name in sorted(spec) if name != "params"}
    check_state(collections, what)
    state_spec = collections or ()

    def apply(
        params: PyTree,
        *inputs: Any,
        key: jax.Array | None = None,
        train: bool | None = None,
        state: PyTree = (),
        **call: Any,
    ) -> Any:
        train = key is not None if train is None else train
        streams = {} if key is None else {name: fold_name(key, name) for name in rngs}
        variables = {"params": params, **(given_state(state_spec, state, what) or {})}
        keywords = {**told(train), **options, **call}
        try:
            outputs, updated = module.apply(
                variables,
                *inputs,
                rngs=streams,
                method=method,
                mutable=list(collections),
                **keywords,
            )
        except errors.InvalidRngError as error:
            raise ConfigError(_no_stream(str(error), what, key is None, rngs)) from error
        if not collections:
            return outputs
        return outputs, written({name: updated[name] for name in collections}) if train else ()

    params = jax.jit(unboxed)(key).get("params", {})
    return Model(spec.get("params", {}), apply, state_spec), params


def _no_stream(message: str, what: str, keyless: bool, rngs: Sequence[str]) -> str:
    found = re.search(r'PRNG for "([^"]+)"', message)
    stream = found[1] if found else "?"
    if stream in rngs and keyless:
        return f"{what} draws random numbers from its stream {stream!r}: call it with key=..."
    return (
        f"{what} draws from the stream {stream!r}, which is not in rngs={tuple(rngs)}: "
        f"from_linen(module, ..., rngs={(*rngs, stream)})"
    )


def to_linen_variables(model: Model, params: PyTree, state: PyTree = ()) -> PyTree:
    """Return the variables with which the original module computes what the model does.

    Law: ``module.apply(to_linen_variables(model, params, state), x)`` equals ``model.apply(params,
    x, state=state)``. They hold plain arrays, without boxes of partitioning metadata.

    Raises:
      ShapeError: the parameters or the state are not the model's; all differences are listed.

    >>> from flax import linen as nn
    >>> model, params = from_linen(nn.Dense(3), jnp.ones((1, 2)))
    >>> nn.Dense(3).apply(to_linen_variables(model, params), jnp.ones((5, 2))).shape
    (5, 3)
    """
    check_values(model.spec, params, "parameters")
    check_values(model.state, state, "state arrays")
    return {"params": params, **(state or {})}
