"""``fnml resume RUN``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from fnml.cli._finish import report
from fnml.recipes import resume


@dataclass(frozen=True)
class Resume:
    """Continue a run from its newest verified checkpoint; the result has the same bits."""

    run: tyro.conf.Positional[Path]
    """The run directory."""
    devices: int | None = None
    """Devices that share a batch's shards this time; the bits are the same. By default as before."""
    mesh: str | None = None
    """Axes that the compiler divides along this time, equal to rounding. By default as before."""
    rules: str | None = None
    """What lies along which axis this time. By default as before."""


def command(arguments: Sequence[str]) -> int:
    """Continue a run."""
    parsed = tyro.cli(Resume, args=arguments, prog="fnml resume")
    return report(resume(parsed.run, devices=parsed.devices, mesh=parsed.mesh, rules=parsed.rules))
