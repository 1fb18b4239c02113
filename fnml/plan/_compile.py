"""Compile a step for a target: trace it here, compile it where the compiler is."""

import gzip
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax import export
from jax.sharding import AbstractMesh

from fnml.core import ConfigError, MissingExtraError, write_atomic
from fnml.plan import _worker
from fnml.plan._targets import Target

PyTree = Any
_PACKAGES = {"tpu": ("libtpu", "tpu-compile"), "cuda": ("jax_cuda12_plugin", "cuda-compile")}
_PYTHON = {"tpu": "FNML_TPU_PYTHON", "cuda": "FNML_CUDA_PYTHON"}
# Kernels whose form JAX does not promise to keep; they are compiled by the same version here.
_KERNELS = ("mosaic_gpu", "mosaic_gpu_v2")
_MINUTES = 30
# Where in the source an operation is from, in a module's text.
_LINES = re.compile(r"^#loc.*$| loc\([^()]*\)", re.MULTILINE)


class Traced(NamedTuple):
    """An exported step: its bytes, and a hash of its program that no line number is part of."""

    step: bytes
    identity: str


class Compiled(NamedTuple):
    """What a compiler made of a step, or why it did not.

    Attributes:
      memory: ``memory_analysis()`` of one chip, by name.
      cost: ``cost_analysis()``: ``flops`` and ``bytes accessed``, where the compiler has it.
      places: of each chip in the order of the mesh, its coordinates.
      text: the optimised program.
      seconds: how long it took.
      error: the compiler's message if there is no program.
    """

    memory: dict[str, int]
    cost: dict[str, float | None]
    places: list[list[int]]
    text: str
    seconds: float
    error: str = ""


def export_step(
    step: Callable[..., Any], leaves: Sequence[Any], tree: Any, mesh: AbstractMesh, platform: str
) -> Traced:
    """Trace a step on flat, placed shapes and lower it for a platform that is not here.

    The state's results lie where the state lay, as they have to for the next step.
    """

    def flat(*values: Any) -> list[Any]:
        with jax.sharding.use_abstract_mesh(mesh):
            return jax.tree.leaves(step(*jax.tree.unflatten(tree, values)))

    state, _ = jax.tree.unflatten(tree, leaves)
    given = jax.tree.leaves(state)
    found = jax.eval_shape(flat, *leaves)
    alike = len(found) >= len(given) and all(
        a.shape == b.shape and a.dtype == b.dtype for a, b in zip(given, found, strict=False)
    )
    places: list[Any] = [leaf.sharding for leaf in given] if alike else []
    places += [None] * (len(found) - len(places))
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in _KERNELS]
    jitted = jax.jit(flat, out_shardings=places)
    made = export.export(jitted, platforms=(platform,), disabled_checks=checks)(*leaves)
    program = _LINES.sub("", made.mlir_module())
    return Traced(bytes(made.serialize()), hashlib.sha256(program.encode()).hexdigest())


def compile_for(
    target: Target,
    mesh: AbstractMesh,
    traced: Traced,
    donated: Sequence[int],
    *,
    python: str | None = None,
    cache: Path | None = None,
) -> Compiled:
    """Compile an exported step: for TPUs and GPUs in the Python that has their compiler.

    Args:
      target: the chips.
      mesh: their arrangement.
      traced: of :func:`export_step`.
      donated: the flat arguments whose memory the results may take.
      python: that Python's interpreter; by default ``FNML_TPU_PYTHON`` or ``FNML_CUDA_PYTHON``,
        or this one if it has the compiler.
      cache: a folder of earlier answers.

    Raises:
      MissingExtraError: there is no such Python.
      ConfigError: it cannot compile, for another reason than the step's memory.
    """
    request = {
        "platform": target.chip.platform,
        "chip": target.chip.name,
        "shape": target.shape,
        "mesh": dict(mesh.shape),
        "donated": list(donated),
        "compiler": target.chip.compiler,
    }
    platform = target.chip.platform
    here = python is None and platform == "cpu" and len(jax.devices("cpu")) >= target.chips
    chosen = None if here else _interpreter(platform, python)
    known = None
    if cache is not None:
        asked = json.dumps([request, chosen, jax.__version__, traced.identity], sort_keys=True)
        known = cache / f"{hashlib.sha256(asked.encode()).hexdigest()}.json.gz"
        if known.is_file():
            return Compiled(**json.loads(gzip.decompress(known.read_bytes())))
    if chosen is None:
        result, text = _worker.compile_step(request, traced.step)
    else:
        result, text = _elsewhere(chosen, request, traced.step)
    if "error" in result:
        if "RESOURCE_EXHAUSTED" not in result["error"]:
            raise ConfigError(f"the compiler for {target.name} refuses the step: {result['error']}")
        result = {"memory": {}, "cost": {}, "places": [], "seconds": 0.0, **result}
    compiled = Compiled(**result, text=text)
    if known is not None:
        known.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(known, gzip.compress(json.dumps(compiled._asdict()).encode()))
    return compiled


def _interpreter(platform: str, python: str | None) -> str:
    """Return the Python whose JAX can compile for a platform."""
    if python:
        return python
    if platform == "cpu":
        return sys.executable
    variable, (package, extra) = _PYTHON[platform], _PACKAGES[platform]
    if named := os.environ.get(variable):
        return named
    if importlib.util.find_spec(package) is not None:
        return sys.executable
    raise MissingExtraError(
        f"compiling for {platform} needs the package {package!r}, which this Python lacks: make it "
        f"an environment of its own (python -m venv DIR; DIR/bin/pip install 'fnml[{extra}]') and "
        f"name its interpreter in {variable} or --python"
    )


def _elsewhere(python: str, request: dict[str, Any], step: bytes) -> tuple[dict[str, Any], str]:
    """Let another interpreter compile."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "PYTHON"))}
    with tempfile.TemporaryDirectory(prefix="fnml-plan-") as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(request))
        (folder / "step.bin").write_bytes(step)
        try:
            run = subprocess.run(
                [python, str(Path(_worker.__file__)), name],
                env=keep,
                capture_output=True,
                text=True,
                check=False,
                timeout=60 * _MINUTES,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConfigError(f"the Python {python!r} cannot compile: {error}") from error
        answer = folder / "result.json"
        if not answer.is_file():
            last = "\n".join(run.stderr.strip().splitlines()[-8:])
            raise ConfigError(
                f"the Python {python!r} ended with exit code {run.returncode} before it had compiled "
                f"anything; it needs jax {jax.__version__}, flatbuffers and the compiler:\n{last}"
            )
        return json.loads(answer.read_text()), (folder / "program.txt").read_text()
