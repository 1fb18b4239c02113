"""Let the compiler divide a training step over a mesh, as shardings say."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fnml.core import LayoutError, ShapeError, State, axis_tuple, path_name

PyTree = Any
Step = Callable[[State, PyTree], tuple[State, PyTree]]
DATA_AXIS = PartitionSpec("data")
_SHOWN = 12


def state_shardings(state: State, param_shardings: PyTree) -> State:
    """Place a whole training state as its parameters are placed.

    A leaf of the optimizer's state lies as a parameter does if its path ends in the parameter's
    and it has the parameter's shape: the moments of Adam, the average of :func:`ema`, also inside
    ``optax.chain``, ``optax.masked``, ``optax.multi_transform`` and :func:`train_only`. All the
    rest (counts, the step, the key, the model's own state) is on every device.

    Args:
      state: the state, or its description by ``jax.eval_shape``.
      param_shardings: a sharding for each parameter, of :func:`fnml.core.shardings`.

    Returns:
      a state of shardings, for :func:`shard`, ``jax.device_put`` and ``jax.jit``'s
      ``out_shardings``.

    Raises:
      ShapeError: ``param_shardings`` is no tree of ``NamedSharding`` like ``state.params``.

    >>> import optax
    >>> from fnml.core import make_mesh
    >>> mesh = make_mesh({"data": 1}, jax.devices()[:1])
    >>> state = State.create({"w": jnp.ones(4)}, optax.adam(0.1), jax.random.key(0))
    >>> placed = state_shardings(state, {"w": NamedSharding(mesh, jax.P("data"))})
    >>> placed.opt_state[0].mu["w"].spec, placed.opt_state[0].count.spec
    (P('data',), P())
    """
    params = jax.tree.leaves_with_path(state.params)
    given = jax.tree.leaves(param_shardings)
    if jax.tree.structure(state.params) != jax.tree.structure(param_shardings) or not all(  # type: ignore[operator]
        isinstance(leaf, NamedSharding) for leaf in given
    ):
        raise ShapeError(
            "state_shardings takes a NamedSharding for each parameter, as "
            "fnml.core.shardings(model.spec, mesh, rules) gives them: expected a tree like "
            f"{jax.tree.structure(state.params)}, got {jax.tree.structure(param_shardings)}"
        )
    if not given:
        raise ShapeError("state_shardings: the state has no parameters to say where it lies")
    everywhere = NamedSharding(given[0].mesh, PartitionSpec())
    by_path = {
        path: (param.shape, where) for (path, param), where in zip(params, given, strict=True)
    }
    longest = max(map(len, by_path))

    def like_param(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        for length in range(min(longest, len(path)), -1, -1):
            shape, where = by_path.get(path[len(path) - length :], (None, None))
            if where is not None and shape == leaf.shape:
                return where
        return everywhere

    placed = jax.tree.map(lambda leaf: everywhere, state)
    return dataclasses.replace(
        placed,
        params=param_shardings,
        opt_state=jax.tree.map_with_path(like_param, state.opt_state),
    )


def shard(
    step: Step,
    mesh: Mesh,
    shardings: State,
    batch: PartitionSpec | PyTree = DATA_AXIS,
    *,
    donate: bool = False,
) -> Step:
    """Compile a step for a mesh: its state lies as ``shardings`` say, its batch is divided.

    The compiler (GSPMD) decides which device computes what and which collectives that takes; the
    step is written for one device. What comes back lies as what went in, and metrics are on every
    device.

    Law: ``shard(step, mesh, shardings) == step`` to rounding: gradients agree to a relative L2 of
    1e-6 in float32. (:func:`data_parallel` is exact instead, and divides the batch alone.)

    Args:
      step: ``step(state, batch) -> (state, metrics)``.
      mesh: the device mesh, with axes of type ``Auto`` (:func:`fnml.core.make_mesh`).
      shardings: of the state, by :func:`state_shardings`.
      batch: a ``PartitionSpec`` for all arrays of the batch, or a tree of them; by default
        ``P("data")``. For a step of :func:`fuse`, whose batches are stacked, ``P(None, "data")``.
      donate: whether the step may reuse the state's memory; the caller's state is gone then.

    Raises:
      LayoutError: the mesh has other axes than ``batch`` names, or ``shardings`` are of another
        mesh; when called: a dimension cannot be divided, or an array has been put elsewhere. All
        faults are listed.

    >>> from fnml.core import make_mesh
    >>> mesh = make_mesh({"data": 1}, jax.devices()[:1])
    >>> everywhere = NamedSharding(mesh, PartitionSpec())
    >>> total = shard(lambda state, x: (state + x.sum(), x.sum()), mesh, everywhere)
    >>> float(total(jnp.float32(1), jnp.ones(4))[0])
    5.0
    """
    batches = jax.tree.map(
        lambda spec: NamedSharding(mesh, _known(spec, mesh)), batch, is_leaf=_is_spec
    )
    strangers = [
        where for where in jax.tree.leaves(shardings) if getattr(where, "mesh", None) != mesh
    ]
    if strangers:
        raise LayoutError(
            f"shard got {len(strangers)} shardings that are of another mesh than {mesh}: make "
            "them with state_shardings(state, fnml.core.shardings(model.spec, mesh, rules))"
        )

    def placed(state: State, batch: PyTree) -> tuple[State, PyTree]:
        # Known while tracing, the mesh keeps what no compiler can divide out of the program.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(state, batch)

    run = jax.jit(
        placed,
        in_shardings=(shardings, batches),
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=(0,) if donate else (),
    )

    def sharded(state: State, batch: PyTree) -> tuple[State, PyTree]:
        try:
            return run(state, batch)
        except ValueError:
            # Looking for faults beforehand would cost every step what only a first one needs.
            faults = _faults("state", state, shardings) + _faults("batch", batch, batches)
            if not faults:
                raise
            shown = faults[:_SHOWN] + ["..."] * (len(faults) > _SHOWN)
            raise LayoutError("these arrays cannot be laid out:\n" + "\n".join(shown)) from None

    return sharded


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def _known(spec: Any, mesh: Mesh) -> PartitionSpec:
    """Return the spec, if its axes are the mesh's."""
    if not _is_spec(spec):
        raise LayoutError(f"shard's batch is a PartitionSpec or a tree of them, got {spec!r}")
    unknown = sorted({axis for axes in map(axis_tuple, spec) for axis in axes} - set(mesh.shape))
    if unknown:
        raise LayoutError(
            f"the batch's {spec} names the mesh axes {unknown}, and the mesh has "
            f"{tuple(mesh.shape)}: pass batch=P(...) with one of those, or P() for a whole batch "
            "on every device"
        )
    return spec


def _faults(what: str, tree: PyTree, shardings: PyTree) -> list[str]:
    """Say which arrays cannot be divided, or lie elsewhere; or that it is another tree."""
    try:
        spread = jax.tree.broadcast(shardings, tree)
    except ValueError as error:
        return [f"{what}: {error}"]
    faults: list[str] = []
    leaves = zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(spread), strict=True)
    for (path, x), where in leaves:
        name, shape, spec = f"{what}/{path_name(path)}".rstrip("/"), jnp.shape(x), where.spec
        before = len(faults)
        if len(spec) > len(shape):
            faults.append(f"{name}: the shape {shape} has fewer dimensions than {spec}")
            continue
        for i, entry in enumerate(spec):
            ways = math.prod(where.mesh.shape[axis] for axis in axis_tuple(entry))
            if shape[i] % ways:
                faults.append(
                    f"{name}: dimension {i} of {shape} has size {shape[i]}, which {ways} devices "
                    f"along {axis_tuple(entry)} do not divide"
                )
        lies = x.sharding if getattr(x, "committed", False) else where
        if len(faults) == before and not lies.is_equivalent_to(where, len(shape)):
            faults.append(
                f"{name} was put on {lies}, expected {spec} on {tuple(where.mesh.shape.items())}: "
                f"jax.device_put({what}, shardings) moves it"
            )
    return faults
