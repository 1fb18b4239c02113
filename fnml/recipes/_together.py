"""What a run does differently where several processes share it."""

import logging
import os
from pathlib import Path
from typing import Any

import jax

from fnml.core import RunError
from fnml.data import Batches, Shared
from fnml.parallel import Processes, initialize
from fnml.recipes._devices import mesh


def join(config: Any) -> Processes:
    """Join the other processes of the run; only process 0 then speaks, but of errors.

    Raises:
      ConfigError: see :func:`fnml.parallel.initialize`.
    """
    processes = initialize(config.run.devices)
    if not processes.first and not os.environ.get("FNML_LOG_LEVEL"):
        logging.getLogger("fnml").setLevel(logging.ERROR)
    return processes


def announce(processes: Processes, directory: Path, config: Any, step: int | None = None) -> None:
    """Tell the launcher what to resume, on how many devices, and where training begins."""
    processes.announce(
        {
            "directory": str(directory.absolute()),
            "devices": config.run.devices,
            "shards": config.run.accumulate,
            "step": step,
        }
    )


def shared(processes: Processes, batches: Batches, config: Any) -> Batches | Shared:
    """Return the stream of batches of which each process reads its part."""
    devices = mesh(config.run.devices)
    if processes.count == 1 or devices is None:
        return batches
    return Shared(batches, jax.NamedSharding(devices, jax.P("data")))


def check_equal(processes: Processes, sha256: str) -> None:
    """Refuse a result that is not the same in every process.

    Raises:
      RunError: parameters differ; all processes are listed.
    """
    found = processes.gather("params_sha256", sha256)
    if found is not None and len(set(found)) > 1:
        listing = ", ".join(f"{i}: {value[:16]}" for i, value in enumerate(found))
        raise RunError(
            f"the processes ended with different parameters ({listing}): their machines or "
            "versions compute differently. The checkpoints are process 0's; 'fnml doctor' on each "
            "host shows what they run"
        )
