"""Say what a training step needs on hardware that is not there."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from fnml.core import ConfigError, LayoutError, ShapeError
from fnml.plan._collectives import Collective, collectives
from fnml.plan._compile import Compiled, compile_for, export_step
from fnml.plan._hlo import parse
from fnml.plan._roofline import Roofline, roofline
from fnml.plan._targets import Target, parse_target
from fnml.plan._traffic import Work, is_kernel, work
from fnml.transforms import cost

PyTree = Any
_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_NEEDED = re.compile(
    r"[Uu]sed ([\d.]+)([KMGT]?) of|\(([\d.]+)([KMGT]?)\) exceeds|usage >= ([\d.]+)([KMGT]?)"
)


@dataclass(frozen=True)
class Memory:
    """Bytes on one chip.

    Attributes:
      parameters: the model's.
      optimizer: the optimizer's state.
      model_state: the model's own state (BatchNorm).
      batch: the batch, and the state's step and key.
      activations: what the forward pass leaves for the backward pass, as far as the program's text
        tells the passes apart.
      temporaries: the rest of the compiler's scratch space: gradients, and what lives in between.
      arguments: ``memory_analysis().argument_size_in_bytes``; more than the rows above where
        the compiler pads arrays.
      outputs: ``output_size_in_bytes``.
      aliased: ``alias_size_in_bytes``: results that take the place of arguments.
      code: ``generated_code_size_in_bytes``.
    """

    parameters: int
    optimizer: int
    model_state: int
    batch: int
    activations: int
    temporaries: int
    arguments: int
    outputs: int
    aliased: int
    code: int

    @property
    def total(self) -> int:
        """All of it: arguments, results in places of their own, scratch space, and the program."""
        scratch = self.activations + self.temporaries
        return self.arguments + self.outputs - self.aliased + scratch + self.code


@dataclass(frozen=True)
class Plan:
    """What a step needs; made by :func:`plan`.

    Attributes:
      target: the chips.
      mesh: their axes.
      memory: bytes on one chip.
      flops: of matrix products and kernels on one chip in a step, what is computed twice
        (rematerialised, or on several chips) included.
      bytes: read from and written to one chip's main memory in a step.
      collectives: what chips say to each other in a step.
      roofline: the seconds that each part of a chip needs for that.
      model_flops: what a step's products come to on all chips together, counted once.
      kernels: how many hand-written kernels the program calls.
      unbounded: how many loops there are whose turns are unknown: they count as one.
      compile_seconds: how long the compiler took.
      refused: the compiler's words if it found the memory too small; then there is no program,
        ``memory`` is what it said and only a lower bound, and the rest is 0.
    """

    target: Target
    mesh: Mapping[str, int]
    memory: Memory
    flops: float
    bytes: float
    collectives: tuple[Collective, ...]
    roofline: Roofline
    model_flops: float
    kernels: int
    unbounded: int
    compile_seconds: float
    refused: str = ""

    @property
    def limit(self) -> int:
        """The bytes of main memory that a program gets on one chip."""
        return self.target.chip.memory

    @property
    def fits(self) -> bool:
        """Whether the memory suffices."""
        return not self.refused and self.memory.total <= self.limit

    @property
    def missing(self) -> int:
        """The bytes by which it does not, on one chip; 0 if it does."""
        return max(0, self.memory.total - self.limit)

    @property
    def seconds(self) -> float:
        """The least time of a step."""
        return self.roofline.seconds

    @property
    def utilisation(self) -> float:
        """The most that model-FLOPs utilisation can be: the model's FLOPs in that time, by the
        peak of all chips on bfloat16."""
        peak = self.target.chips * self.target.chip.bf16
        return self.model_flops / (peak * self.seconds) if self.seconds else 0.0

    def table(self) -> Any:
        """Return a ``rich`` table, to be printed with ``rich.print``."""
        from fnml.plan._report import table

        return table(self)


def plan(
    step: Callable[..., Any],
    state_shapes: PyTree,
    batch_shapes: PyTree,
    *,
    target: str | Target = "cpu",
    model_flops: float | None = None,
    donate: bool = True,
    python: str | None = None,
    cache: Path | None = None,
) -> Plan:
    """Compile a training step with the real compiler of chips that are not there.

    Nothing is computed and no parameter is held. The step is traced here, lowered for the target's
    platform (so that kernels for it are in the program), and compiled by libtpu or by XLA for
    CUDA in a Python of its own.

    Law: with ``target="cpu"``, ``memory`` equals ``jax.jit(step, donate_argnums=0).lower(state,
    batch).compile().memory_analysis()``.

    Args:
      step: ``step(state, batch) -> (state, metrics)``, plain, or of
        :func:`fnml.transforms.shard` and the like over a mesh of as many devices.
      state_shapes: the state as ``jax.ShapeDtypeStruct`` (or arrays), such as
        ``jax.eval_shape(init)``; with ``NamedSharding`` where it is divided, over an
        ``AbstractMesh`` or any other mesh of as many devices as the target has chips.
      batch_shapes: the same for the batch of a step. Without any sharding the state is on every
        chip, and the batch is divided along its first axis.
      target: such as ``v5e:4x4``, ``h100:8x8`` (hosts x GPUs), ``cpu`` or ``cpu:8``.
      model_flops: what utilisation counts; by default the products of the step as it is traced,
        which with rematerialisation are those computed twice, too.
      donate: whether the results may take the state's memory.
      python: the interpreter that has the target's compiler; by default that of
        ``FNML_TPU_PYTHON`` or ``FNML_CUDA_PYTHON``, or this one.
      cache: a folder to keep the compiler's answers in.

    Raises:
      ConfigError: the target is none, or its compiler refuses the step.
      LayoutError: the shardings' mesh has another number of devices than the target has chips.
      MissingExtraError: there is no Python with the target's compiler.

    >>> import fnml
    >>> state = fnml.State(*(jax.ShapeDtypeStruct((), "float32") for _ in range(4)))
    >>> found = fnml.plan(lambda s, b: (s, b.sum()), state, jax.ShapeDtypeStruct((2,), "float32"))
    >>> found.memory.parameters, found.fits
    (4, True)
    """
    chosen = parse_target(target) if isinstance(target, str) else target
    mesh = _mesh(chosen, (state_shapes, batch_shapes))
    state, batch = _placed(mesh, state_shapes, batch_shapes)
    leaves, tree = jax.tree.flatten((state, batch))
    count = len(jax.tree.leaves(state))
    if model_flops is None:
        with jax.sharding.use_abstract_mesh(mesh):
            # In the plain forms: what a kernel computes twice is no work of the model's.
            model_flops = cost(step, state, batch, platform="other").total.products
    exported = export_step(step, leaves, tree, mesh, chosen.chip.platform)
    donated = range(count) if donate else ()
    compiled = compile_for(chosen, mesh, exported, donated, python=python, cache=cache)
    if compiled.error:
        return _refused(chosen, mesh, compiled, state, batch, model_flops)
    program = parse(compiled.text)
    done, said = work(program), tuple(collectives(program))
    if done.unstated:
        done = _stated(done, step, state, batch, mesh, chosen.chip.platform)
    kernels = sum(times for i, times in program.run() if is_kernel(i))
    return Plan(
        target=chosen,
        mesh=dict(mesh.shape),
        memory=_memory(compiled, state, batch, done),
        flops=sum(done.flops.values()),
        bytes=done.bytes,
        collectives=said,
        roofline=roofline(chosen, done, said, compiled.places),
        model_flops=model_flops,
        kernels=kernels,
        unbounded=len(program.unbounded),
        compile_seconds=compiled.seconds,
    )


def _stated(
    done: Work,
    step: Callable[..., Any],
    state: PyTree,
    batch: PyTree,
    mesh: AbstractMesh,
    platform: str,
) -> Work:
    """Add what the program's kernels compute: by the step's trace, where they do not state it."""
    with jax.sharding.use_abstract_mesh(mesh):
        each = cost(step, state, batch, platform=platform).total.products / mesh.size
    known = sum(done.flops.values())
    main = max(done.flops, key=done.flops.__getitem__, default="bf16")
    added = {main: done.flops.get(main, 0.0) + max(0.0, each - known)}
    return done._replace(flops={**done.flops, **added})


def _mesh(target: Target, shapes: PyTree) -> AbstractMesh:
    """Return the mesh that the shapes are divided over; one axis of all chips if there is none."""
    found = {
        leaf.sharding.mesh.abstract_mesh
        for leaf in jax.tree.leaves(shapes)
        if isinstance(getattr(leaf, "sharding", None), NamedSharding)
    }
    if len(found) > 1:
        raise LayoutError(f"plan got shapes divided over {len(found)} meshes: {found}")
    auto = (AxisType.Auto,)
    mesh = found.pop() if found else AbstractMesh((target.chips,), ("data",), axis_types=auto)
    if mesh.size != target.chips:
        raise LayoutError(
            f"plan got a mesh {dict(mesh.shape)} of {mesh.size} devices for {target.name}, which has "
            f"{target.chips} chips"
        )
    return mesh


def _placed(mesh: AbstractMesh, state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
    """Describe the arguments with a sharding over the mesh for each."""
    bare = not any(
        isinstance(getattr(leaf, "sharding", None), NamedSharding)
        for leaf in jax.tree.leaves((state, batch))
    )

    def place(leaf: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        given = getattr(leaf, "sharding", None)
        spec = given.spec if isinstance(given, NamedSharding) else spec
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise ShapeError(f"plan takes shapes (jax.ShapeDtypeStruct), got {leaf!r}")
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def divided(leaf: Any) -> jax.ShapeDtypeStruct:
        along = bare and mesh.size > 1 and leaf.ndim and leaf.shape[0] % mesh.size == 0
        return place(leaf, PartitionSpec(mesh.axis_names[0]) if along else PartitionSpec())

    return jax.tree.map(lambda x: place(x, PartitionSpec()), state), jax.tree.map(divided, batch)


def _bytes(tree: PyTree) -> int:
    """Return the bytes of a tree's leaves on one device."""

    def one(leaf: Any) -> int:
        aval = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
        shape = leaf.sharding.shard_shape(leaf.shape) + aval.shape[len(leaf.shape) :]
        return math.prod(shape) * jnp.dtype(aval.dtype).itemsize

    return sum(map(one, jax.tree.leaves(tree)))


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _parts(state: PyTree, batch: PyTree) -> dict[str, int]:
    """Return the bytes of what a step is given, by part."""
    names = {"parameters": "params", "optimizer": "opt_state", "model_state": "model_state"}
    parts = {name: _bytes(getattr(state, field, ())) for name, field in names.items()}
    return parts | {"batch": _bytes((state, batch)) - sum(parts.values())}


def _memory(compiled: Compiled, state: PyTree, batch: PyTree, done: Work) -> Memory:
    found = compiled.memory
    kept = min(done.kept, found["temp"])
    return Memory(
        **_parts(state, batch),
        activations=kept,
        temporaries=found["temp"] - kept,
        arguments=found["argument"],
        outputs=found["output"],
        aliased=found["alias"],
        code=found["generated_code"],
    )


def _refused(
    target: Target,
    mesh: AbstractMesh,
    compiled: Compiled,
    state: PyTree,
    batch: PyTree,
    model_flops: float,
) -> Plan:
    """Make a plan of what a compiler says that found no room."""
    parts = _parts(state, batch)
    arguments = sum(parts.values())
    said = [
        float(number) * _UNITS[unit]
        for groups in _NEEDED.findall(compiled.error)
        for number, unit in zip(groups[::2], groups[1::2], strict=True)
        if number
    ]
    if not said:
        raise ConfigError(f"the compiler for {target.name} refuses the step: {compiled.error}")
    # A compiler that speaks of its scratch space alone has not counted the arguments.
    alone = "HLO temporaries" in compiled.error
    needed = int(max(said)) + (arguments if alone else 0)
    memory = Memory(
        **parts,
        activations=0,
        temporaries=max(needed, target.chip.memory + 1) - arguments,
        arguments=arguments,
        outputs=0,
        aliased=0,
        code=0,
    )
    empty = Roofline(0.0, 0.0, 0.0, 0.0)
    return Plan(
        *(target, dict(mesh.shape), memory, 0.0, 0.0, (), empty, model_flops, 0, 0),
        *(compiled.seconds, compiled.error.split("\n")[0]),
    )
