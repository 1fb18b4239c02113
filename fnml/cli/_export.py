"""``fnml export RUN --to onnx``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from fnml.recipes import export_onnx


@dataclass(frozen=True)
class Export:
    """Write a run's model as a file that other runtimes run, and check it against the model."""

    run: tyro.conf.Positional[Path]
    """The run directory."""
    to: Literal["onnx"] = "onnx"
    """The format."""
    path: Path | None = None
    """The file; by default model.onnx in the run directory."""
    step: int | None = None
    """The checkpoint's step; by default the newest."""
    opset: int = 21
    """The version of ONNX's operators."""
    dynamic: str = "B, ..."
    """Sizes left open, as symbols; "B, T" for sequences of any length, too; "..." for none."""
    constraints: tuple[str, ...] = ()
    """What is known of them, such as "T <= 128"."""
    unroll: int = 0
    """Loops of up to so many turns are written as straight lines, for runtimes without loops."""


def command(arguments: Sequence[str]) -> int:
    """Export, and print what the file takes and gives, and how far it is from the model."""
    parsed = tyro.cli(Export, args=arguments, prog="fnml export")
    done = export_onnx(
        parsed.run,
        parsed.path or parsed.run / "model.onnx",
        parsed.step,
        opset=parsed.opset,
        dynamic=parsed.dynamic,
        constraints=parsed.constraints,
        unroll=parsed.unroll,
    )
    print(f"{done.path}: step {done.step}, {done.path.stat().st_size} bytes, opset {parsed.opset}")
    for name, ports in (("input", done.inputs), ("output", done.outputs)):
        for port in ports:
            print(f"{name} {port}")
    print(f"checked in {done.checked}: relative difference {done.difference:.2g}")
    return 0
