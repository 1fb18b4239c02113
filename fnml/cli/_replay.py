"""``fnml replay RUN --step N``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from fnml.checkpoint import save_safetensors, tree_sha256
from fnml.core import ConfigError
from fnml.recipes import replay, without_keys


@dataclass(frozen=True)
class Replay:
    """Rebuild the exact state before a step of a run, and the batch that it learns from.

    It goes on from the newest undamaged checkpoint before the step; the run itself is not touched.
    """

    run: tyro.conf.Positional[Path]
    """The run directory."""
    step: int
    """Which step, counted from 1."""
    save: Path | None = None
    """Write state/... and batch/... to this file: .safetensors or .npz."""


def command(arguments: Sequence[str]) -> int:
    """Replay, print hashes, and save if asked to."""
    parsed = tyro.cli(Replay, args=arguments, prog="fnml replay")
    if parsed.save is not None and parsed.save.suffix not in (".safetensors", ".npz"):
        raise ConfigError(f"--save {parsed.save}: expected a name in .safetensors or .npz")
    found = replay(parsed.run, parsed.step)
    print(f"step {found.step} of {parsed.run}, from the checkpoint of step {found.start}")
    print(f"state_sha256 {tree_sha256(found.state)}")
    print(f"params_sha256 {tree_sha256(found.state.params)}")
    print(f"batch_sha256 {tree_sha256(found.batch)}")
    print(f"examples {' '.join(map(str, found.examples.tolist()))}")
    for name, value in found.metrics.items():
        print(f"{name} {value!r}")
    print(f"after: params_sha256 {tree_sha256(found.after.params)}")
    if parsed.save is not None:
        arrays = {f"state/{name}": x for name, x in without_keys(found.state).items()}
        arrays |= {f"batch/{name}": np.asarray(x) for name, x in found.batch.items()}
        if parsed.save.suffix == ".npz":
            np.savez(parsed.save, **arrays)  # type: ignore[arg-type]
        else:
            save_safetensors(parsed.save, arrays)
        print(f"saved {len(arrays)} arrays in {parsed.save}")
    return 0
