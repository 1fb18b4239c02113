"""``fnml diff A B``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from fnml.recipes import diff


@dataclass(frozen=True)
class Diff:
    """Find where two runs part: the first step, the parameters and the examples of its batch.

    The exit code is 1 if they part.
    """

    a: tyro.conf.Positional[Path]
    """A run directory."""
    b: tyro.conf.Positional[Path]
    """Another run directory."""


def command(arguments: Sequence[str]) -> int:
    """Compare two runs; return 1 if they part."""
    parsed = tyro.cli(Diff, args=arguments, prog="fnml diff")
    found = diff(parsed.a, parsed.b)
    for line in found.config:
        print(line)
    if found.row is not None:
        print(f"first row that differs: {found.row}")
    if found.step is not None:
        when = f"at step {found.step}" if found.step else "before the first step"
        print(f"they part {when}")
        for title, lines in (("state", found.parameters), ("batch", found.examples)):
            for line in lines:
                print(f"  {title}: {line}")
    for remark in found.remarks:
        print(remark)
    if found.same:
        print("the runs are the same, as far as both go")
    return int(not found.same)
