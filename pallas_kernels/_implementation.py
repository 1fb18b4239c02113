"""Choose which body of a kernel runs where, and run it."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
from jax import lax

from fnml.core import divided
from fnml.pallas_kernels.native import active, unbatched

Implementation = Literal["auto", "reference", "lax", "pallas", "native", "cudnn"]
"""How a kernel is computed.

``"auto"``: the hand-written body on the platforms that have one for these shapes and dtypes (on
CPUs within :func:`fnml.pallas_kernels.native_kernels`), the blocked lax body everywhere else, and
where a mesh is set (``jax.set_mesh``, :func:`fnml.transforms.shard`) for the compiler to divide
the program over. ``"reference"``: the textbook form, with every derivative. ``"lax"``: the
blocked lax body on every platform. ``"pallas"``: the hand-written body for TPUs and GPUs, or an
error; ``"native"``: that for CPUs, in C++, or an error.
``"cudnn"``: NVIDIA's library or an error; "auto" never takes it, as what can be traced with it
depends on the machine.
"""

Refusals = Mapping[str, Sequence[str]]
"""For each body a kernel has ("tpu", "cuda", "native", "cudnn"): why it cannot run this call.

An empty sequence says that it can.
"""

Bodies = Mapping[str, Callable[..., Any]]
"""What runs, by the name of the body."""


class Choice(NamedTuple):
    """Which body runs; hashable, so that it may be a static argument.

    Attributes:
      only: the one body that runs wherever this is lowered, or ``None`` to choose by platform.
      tpu: the body for TPUs, or ``None``.
      cuda: the body for NVIDIA GPUs, or ``None``.
      cpu: the body for CPUs, or ``None``.
      strict: whether every other platform is an error instead of the lax body.
      interpret: what ``pallas_call`` gets as ``interpret``.
    """

    only: str | None = None
    tpu: str | None = None
    cuda: str | None = None
    cpu: str | None = None
    strict: bool = False
    interpret: Any = False


def choose(
    kernel: str,
    implementation: Implementation,
    refusals: Refusals,
    *,
    interpret: Any = None,
    worth: bool = True,
) -> Choice:
    """Decide, from what is known while tracing, which body of ``kernel`` runs on which platform.

    Args:
      kernel: the kernel's name, for messages.
      implementation: see :data:`Implementation`.
      refusals: the bodies there are beside the reference and lax, and what each cannot do here.
      interpret: ``"tpu"`` or ``"cuda"`` to run that Pallas body in its interpreter on any
        platform, or the interpreter's own parameters (``pltpu.InterpretParams``,
        ``InterpretGPUParams``). Only with ``implementation="pallas"``.
      worth: whether ``"auto"`` should use a TPU's or a GPU's kernel, for instance by size.

    Raises:
      ValueError: the implementation is unknown, or ``interpret`` does not go with it.
      NotImplementedError: no body of the chosen implementation can do this; every reason is named.
    """
    options = get_args(Implementation)
    if implementation not in options:
        near = difflib.get_close_matches(str(implementation), options, 1)
        raise ValueError(
            f"{kernel} got implementation={implementation!r}: expected one of "
            f"{', '.join(map(repr, options))}.{f' Did you mean {near[0]!r}?' if near else ''}"
        )
    body, interpreter = _interpreter(kernel, interpret)
    if body is not None and implementation != "pallas":
        raise ValueError(
            f"{kernel} got interpret={interpret!r} with implementation={implementation!r}: only "
            'a Pallas body can be interpreted, pass implementation="pallas"'
        )
    if implementation in ("reference", "lax"):
        return Choice(only=implementation)
    able = {name for name, reasons in refusals.items() if not reasons}
    if implementation == "auto":
        # No kernel can be divided by the compiler.
        if divided():
            return Choice(only="lax")
        cpu = "native" if active() and "native" in able else None
        tpu, cuda = (name if worth and name in able else None for name in ("tpu", "cuda"))
        return Choice(tpu=tpu, cuda=cuda, cpu=cpu) if tpu or cuda or cpu else Choice(only="lax")
    wanted: list[str]
    wanted = [body] if body else ["tpu", "cuda"] if implementation == "pallas" else [implementation]
    if not able.intersection(wanted):
        raise NotImplementedError(_no_body(kernel, implementation, wanted, refusals))
    if implementation == "native":
        return Choice(cpu="native", strict=True)
    if implementation != "pallas":
        return Choice(only=implementation)
    if body is not None:
        return Choice(only=body, interpret=interpreter)
    return Choice(
        tpu="tpu" if "tpu" in able else None, cuda="cuda" if "cuda" in able else None, strict=True
    )


def _interpreter(kernel: str, interpret: Any) -> tuple[str | None, Any]:
    """Return which body is to be interpreted, and what ``pallas_call`` is told."""
    if interpret is None:
        return None, False
    if interpret == "tpu":
        return "tpu", True
    if interpret == "cuda":
        # The class is not public yet; only who asks for the interpreter depends on it.
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

        return "cuda", InterpretGPUParams()
    kinds = {"InterpretParams": "tpu", "InterpretGPUParams": "cuda"}
    if type(interpret).__name__ in kinds:
        return kinds[type(interpret).__name__], interpret
    raise ValueError(
        f'{kernel} got interpret={interpret!r}: expected None, "tpu", "cuda", or the parameters '
        "of an interpreter (pltpu.InterpretParams)"
    )


def _no_body(kernel: str, implementation: str, wanted: list[str], refusals: Refusals) -> str:
    reasons = [
        f"{name}: {'; '.join(refusals[name])}" if name in refusals else f"{name}: no such body"
        for name in wanted
    ]
    able = [name for name, faults in refusals.items() if not faults]
    return (
        f"{kernel} has no body for implementation={implementation!r} here ({', '.join(reasons)}). "
        f"These can do it: {', '.join(['reference', 'lax', *able])}"
    )


def run(choice: Choice, bodies: Bodies, *operands: Any) -> Any:
    """Run the chosen body on arrays (any pytrees), with derivatives of the lax body's.

    ``bodies`` maps "lax", "tpu", "cuda" ... to functions of the operands with equal results; the
    Pallas bodies ("tpu", "cuda") take ``interpret`` as a keyword too. Which one runs is decided
    when the program is lowered for a platform, not by the devices at hand.

    Whatever differentiates this (a ``custom_vjp``'s rules, differentiated once more) gets the
    lax body's derivative: hand-written kernels have none of their own.
    """
    if choice.only == "lax" or choice == Choice():
        return bodies["lax"](*operands)

    def body(name: str) -> Callable[..., Any]:
        if name not in ("tpu", "cuda"):
            return bodies[name]
        return lambda *operands: bodies[name](*operands, interpret=choice.interpret)

    @jax.custom_jvp
    def dispatch(*operands: Any) -> Any:
        if choice.only is not None:
            return body(choice.only)(*operands)
        chosen = {"tpu": choice.tpu, "cuda": choice.cuda}
        by_platform = {platform: body(name) for platform, name in chosen.items() if name}
        if choice.cpu:
            by_platform["cpu"] = unbatched(bodies[choice.cpu], bodies["lax"])
        if choice.strict:
            return lax.platform_dependent(*operands, **by_platform)
        return lax.platform_dependent(*operands, default=bodies["lax"], **by_platform)

    @dispatch.defjvp
    def _(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
        return jax.jvp(bodies["lax"], primals, tangents)

    return dispatch(*operands)


def refuse(kernel: str, faults: Sequence[str]) -> None:
    """Raise all faults of a call in one error, or do nothing if there are none.

    Raises:
      ValueError: there is a fault.
    """
    if faults:
        raise ValueError(f"{kernel}: " + "; ".join(faults))
