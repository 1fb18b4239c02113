"""``fnml eval RUN``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from fnml.recipes import evaluate, load


@dataclass(frozen=True)
class Eval:
    """Evaluate a run's model on the recipe's held-out set."""

    run: tyro.conf.Positional[Path]
    """The run directory."""
    step: int | None = None
    """The checkpoint's step; by default the newest."""


def command(arguments: Sequence[str]) -> int:
    """Evaluate and print one ``name value`` line for each metric."""
    parsed = tyro.cli(Eval, args=arguments, prog="fnml eval")
    loaded = load(parsed.run, parsed.step)
    print(f"step {loaded.step}")
    for name, value in evaluate(loaded).items():
        print(f"{name} {value:.6g}")
    return 0
