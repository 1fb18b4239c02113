"""``fnml sample RUN``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from fnml.recipes import SampleConfig, load


@dataclass(frozen=True)
class Sample:
    """Draw from a run's model: text, or digits with what they are taken for."""

    run: tyro.conf.Positional[Path]
    """The run directory."""
    sample: SampleConfig = SampleConfig()
    """What to draw."""
    step: int | None = None
    """The checkpoint's step; by default the newest."""


def command(arguments: Sequence[str]) -> int:
    """Draw and print."""
    parsed = tyro.cli(
        Sample, args=arguments, prog="fnml sample", config=(tyro.conf.OmitArgPrefixes,)
    )
    loaded = load(parsed.run, parsed.step)
    print(loaded.task.sample(loaded.state.params, loaded.state.model_state, parsed.sample))
    return 0
