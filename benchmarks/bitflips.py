"""Is any flipped bit of a checkpoint restored silently?

Two steps of one training state are saved; then single bits of the newer one are flipped, one at a
time, spread over all of its files: arrays, metadata, meta.json and the manifest itself. After
each flip the directory is scanned and restored. A flip is silent if the scan does not name
its file, or if the restored state is neither the older step's, whole, nor an error. Before, between
and after the flips the unflipped checkpoint is restored as a control.

    python benchmarks/bitflips.py --flips 1000

Exit code 1 if a flip is silent or a control fails.
"""

import argparse
import dataclasses
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fnml.checkpoint import Checkpointer, restore, tree_sha256, verify
from fnml.core import CheckpointError, State

OLD, NEW = 10, 20


def state(width: int) -> State:
    """Make a state with several dtypes, a typed key and AdamW's moments."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "kernel": jax.random.normal(keys[0], (width, width)),
        "half": jax.random.normal(keys[1], (width,), jnp.bfloat16),
        "bias": jnp.zeros(width),
    }
    return State.create(params, optax.adamw(1e-3), keys[2])


def flips(files: list[Path], count: int, rng: np.random.Generator) -> list[tuple[Path, int, int]]:
    """Choose ``count`` bits, as many in each file, ``(file, byte, bit)``."""
    return [
        (file, int(rng.integers(file.stat().st_size)), int(rng.integers(8)))
        for file in (files[i % len(files)] for i in range(count))
    ]


def run(directory: Path, count: int, width: int, seed: int) -> tuple[dict[str, Counter], int]:
    """Flip, scan and restore; return the outcomes by file, and how many controls failed."""
    first = state(width)
    second = dataclasses.replace(first, step=first.step + NEW)
    with Checkpointer(directory) as keeper:
        keeper.save(OLD, first, {"position": OLD})
        keeper.save(NEW, second, {"position": NEW})
    expected = {OLD: tree_sha256(first), NEW: tree_sha256(second)}
    step = directory / f"{NEW:08d}"
    files = sorted(path for path in step.rglob("*") if path.is_file())

    def restored() -> tuple[int | None, list[str]]:
        said: list[str] = []
        try:
            found: Any = restore(directory, first, on_skip=said.append)
        except CheckpointError as error:
            return None, [*said, str(error)]
        whole = tree_sha256(found.state) == expected[found.step]
        right = found.meta == {"position": found.step}
        return (found.step if whole and right else -1), said

    def control() -> bool:
        return restored() == (NEW, []) and not any(verify(directory).values())

    failed = 0 if control() else 1
    outcomes: dict[str, Counter] = {path.relative_to(step).as_posix(): Counter() for path in files}
    for number, (file, byte, bit) in enumerate(flips(files, count, np.random.default_rng(seed)), 1):
        name = file.relative_to(step).as_posix()
        whole = file.read_bytes()
        broken = bytearray(whole)
        broken[byte] ^= 1 << bit
        file.write_bytes(broken)
        named = [fault.file for fault in verify(directory)[NEW]] == [name]
        got, said = restored()
        fell_back = got == OLD and len(said) == 1 and name in said[0]
        refused = got is None and name in " ".join(said)
        outcomes[name]["flips"] += 1
        outcomes[name]["named by the scan"] += named
        outcomes[name]["older step restored"] += fell_back
        outcomes[name]["silent"] += not (named and (fell_back or refused))
        file.write_bytes(whole)
        if number % 100 == 0 and not control():
            failed += 1
    return outcomes, failed + (0 if control() else 1)


def main() -> int:
    """Print a table by file; return 1 if a flip was silent or a control failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--width", type=int, default=64, help="of the state's largest array")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        outcomes, failed = run(Path(directory), options.flips, options.width, options.seed)
    columns = ("flips", "named by the scan", "older step restored", "silent")
    print(f"{'file':<50}" + "".join(f"{column:>21}" for column in columns))
    for name, counts in outcomes.items():
        print(f"{name:<50}" + "".join(f"{counts[column]:>21}" for column in columns))
    total = sum(outcomes.values(), Counter())
    print(f"{'all':<50}" + "".join(f"{total[column]:>21}" for column in columns))
    print(f"controls that failed: {failed}; {time.perf_counter() - began:.0f} s")
    return int(bool(total["silent"] or failed))


if __name__ == "__main__":
    raise SystemExit(main())
