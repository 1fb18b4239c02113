"""flax.nnx modules as models, and back."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from fnml.core import ConfigError, Initializer, Model, fold_name
from fnml.interop._draw import drawers
from fnml.interop._guest import (
    Flags,
    check_state,
    check_values,
    given_state,
    make_param,
    read_flags,
    written,
)

if TYPE_CHECKING:
    from flax import nnx

PyTree = Any
Path = tuple[Any, ...]


def from_nnx(
    module: "nnx.Module | Callable[..., nnx.Module]",
    *,
    key: jax.Array | None = None,
    method: str = "__call__",
    flags: Flags | None = None,
    **options: Any,
) -> tuple[Model, PyTree]:
    """Make a model of a flax nnx module, or of a function that constructs one.

    ``model.apply(params, *inputs, key=None, train=None, **options)`` runs the module, put into
    ``module.train()`` or ``module.eval()``. ``train`` is by default whether there is a ``key``. A
    module with variables that are neither parameters nor random streams, such as BatchNorm's, is
    called with ``state=`` and returns ``(outputs, stats)``, ``stats`` being ``()`` unless
    ``train``. The random stream at ``path`` has the key ``fold_name(key, path)`` and starts
    counting at 0. The module is split once; compile with ``jax.jit``, never ``nnx.jit``.

    ``model.spec`` is a dict by the module's attributes, with items of lists under ``"0"``, ``"1"``
    and so on. Sharding metadata, as of ``nnx.with_partitioning``, are the axes.

    Laws: ``apply`` has the bits of the module, called under ``jax.jit``. ``params`` are those of
    ``constructor(rngs=nnx.Rngs(key))``, or the instance's own. ``init(model.spec, k)`` draws the
    leaf at ``path`` as the constructor does from ``fold_name(k, path)``; an instance cannot be
    drawn again, so its leaves are its own values for every ``k``. ``stats`` are the variables as
    the module wrote them, with weight 1: ``train_step(..., momentum=0.0)`` puts exactly them into
    the state, so that BatchNorm's own ``momentum`` counts (any other would average twice). Over
    several logical shards it is their mean.

    Args:
      module: a module, which is not changed, or a function called as ``constructor(rngs=...)``,
        such as the class itself or a :func:`functools.partial` of it.
      key: constructs the module; by default ``jax.random.key(0)``.
      method: the name of the method to call.
      flags: ``flags(train)`` returns the keywords that tell the method whether it trains. By
        default those of ``train``, ``training``, ``is_training``, ``deterministic`` and
        ``use_running_average`` that it takes and that are not fixed as attributes.
      **options: keywords for every call; a call can override them.

    Raises:
      ConfigError: what was given makes no module; it keeps state that is no float; or it trains
        with random streams but without a key (when called).
      ShapeError: the state is not the model's (when called).

    >>> from flax import nnx
    >>> model, params = from_nnx(lambda rngs: nnx.Linear(2, 3, rngs=rngs))
    >>> model.spec["kernel"].shape, model.apply(params, jnp.ones((5, 2))).shape
    ((2, 3), (5, 3))
    """
    from flax import nnx

    key = jax.random.key(0) if key is None else key
    if isinstance(module, nnx.Module):
        constructor, built = None, module
    else:
        constructor, built = module, _construct(module, key)
    what = type(built).__name__
    told = read_flags(built, getattr(built, method)) if flags is None else flags

    graphs = {}
    for train in (True, False):
        copy = nnx.clone(built)
        copy.train() if train else copy.eval()
        graphs[train] = nnx.graphdef(copy)
    trained, streams, kept, fixed = _parts(built)

    def initialise(key: jax.Array) -> PyTree:
        params, _, state, _ = _parts(_construct(constructor, key))  # type: ignore[arg-type]
        return [variable.get_value() for part in (params, state) for _, variable in part]

    inits = (
        drawers(initialise, len(trained) + len(kept))
        if constructor is not None
        else [_always(variable.get_value()) for _, variable in (*trained, *kept)]
    )
    described = [
        (path, make_param(variable.get_value(), _names(variable), init))
        for (path, variable), init in zip((*trained, *kept), inits, strict=True)
    ]
    spec, state_spec = _nest(described[: len(trained)]), _nest(described[len(trained) :]) or ()
    check_state(state_spec, what)

    def apply(
        params: PyTree,
        *inputs: Any,
        key: jax.Array | None = None,
        train: bool | None = None,
        state: PyTree = (),
        **call: Any,
    ) -> Any:
        train = key is not None if train is None else train
        if train and streams and key is None:
            raise ConfigError(
                f"{what} has random streams and trains: call it with key=..., or with train=False"
            )
        given_state(state_spec, state, what)
        # Only evaluation comes here without a key; a module that draws even then repeats itself.
        own = jax.random.key(0) if key is None else key
        flat = [
            *_replaced(trained, params),
            *_replaced(kept, state),
            *((path, _stream(path, variable, own)) for path, variable in streams),
            *fixed,
        ]
        with nnx.use_eager_sharding(False):
            merged = nnx.merge(graphs[bool(train)], nnx.from_flat_state(flat))
            outputs = getattr(merged, method)(*inputs, **{**told(train), **options, **call})
        if not kept:
            return outputs
        if not train:
            return outputs, ()
        after = dict(nnx.to_flat_state(nnx.state(merged)))
        return outputs, written(_nest([(path, after[path].get_value()) for path, _ in kept]))

    params = _nest([(path, variable.get_value()) for path, variable in trained])
    return Model(spec, apply, state_spec), params


def into_nnx(module: "nnx.Module", params: PyTree, state: PyTree = ()) -> None:
    """Write a model's parameters and state into the nnx module it came from, or into its like.

    Law: the module then computes what ``model.apply(params, x, state=state)`` does. Nothing is
    written if anything does not fit.

    Raises:
      ShapeError: the parameters or the state are not the module's; all differences are listed.

    >>> from flax import nnx
    >>> layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> model, params = from_nnx(layer)
    >>> into_nnx(layer, jax.tree.map(jnp.zeros_like, params))
    >>> float(layer(jnp.ones((1, 2))).sum())
    0.0
    """
    from flax import nnx

    trained, _, kept, _ = _parts(module)
    for part, values, what in ((trained, params, "parameters"), (kept, state, "state arrays")):
        expected = _nest([(p, make_param(v.get_value(), None, None)) for p, v in part])
        check_values(expected or (), values, what)
    nnx.update(module, nnx.from_flat_state([*_replaced(trained, params), *_replaced(kept, state)]))


def _construct(constructor: "Callable[..., nnx.Module]", key: jax.Array) -> "nnx.Module":
    from flax import nnx

    what = getattr(constructor, "__name__", type(constructor).__name__)
    # Annotated variables would otherwise ask for a mesh: here they are logical names only.
    with nnx.use_eager_sharding(False):
        try:
            built = constructor(rngs=nnx.Rngs(key))
        except TypeError as error:
            raise ConfigError(
                f"{what} cannot be called as constructor(rngs=...): {error}. Give a module, or a "
                "function such as lambda rngs: Net(3, 4, rngs=rngs)"
            ) from error
    if not isinstance(built, nnx.Module):
        raise ConfigError(f"{what} constructs {type(built).__name__}, expected an nnx.Module")
    return built


def _parts(module: "nnx.Module") -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    """Split a module's variables: parameters, random streams, state, and bare arrays."""
    from flax import nnx

    _, *parts = nnx.split(module, nnx.Param, nnx.RngState, ...)
    params, streams, rest = parts
    flat = list(nnx.to_flat_state(rest))
    kept = [(path, leaf) for path, leaf in flat if isinstance(leaf, nnx.Variable)]
    fixed = [(path, leaf) for path, leaf in flat if not isinstance(leaf, nnx.Variable)]
    return list(nnx.to_flat_state(params)), list(nnx.to_flat_state(streams)), kept, fixed


def _names(variable: Any) -> Any:
    # Releases of flax differ in what they call it.
    found = variable.get_metadata()
    names = (found.get(name) for name in ("out_sharding", "sharding_names", "sharding"))
    return next((n for n in names if n), None)


def _always(value: jax.Array) -> Initializer:
    return lambda key, shape, dtype: jnp.asarray(value, dtype)


def _nest(flat: list[tuple[Path, Any]]) -> dict[str, Any]:
    """Make a tree of dicts; list indices become text, so that keys of one dict can be sorted."""
    tree: dict[str, Any] = {}
    for path, leaf in flat:
        node = tree
        for part in path[:-1]:
            node = node.setdefault(str(part), {})
        node[str(path[-1])] = leaf
    return tree


def _replaced(part: list[Any], tree: PyTree) -> list[tuple[Path, Any]]:
    """Return the variables of ``part`` with the values that ``tree`` holds at their paths."""

    def find(path: Path) -> Any:
        node = tree
        for name in path:
            node = node[str(name)]
        return node

    return [(path, variable.replace(find(path))) for path, variable in part]


def _stream(path: Path, variable: Any, key: jax.Array) -> Any:
    from flax import nnx

    value = variable.get_value()
    if not isinstance(variable, nnx.RngKey):
        return variable.replace(jnp.zeros_like(value))
    own = fold_name(key, "/".join(map(str, path[:-1])))
    return variable.replace(jax.random.split(own, value.shape) if value.shape else own)
