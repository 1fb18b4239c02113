"""How long does a checkpoint stop the training thread, and how long does it take altogether?

Run: ``python benchmarks/checkpoint.py`` (about three minutes on two cores; ``--mb 600`` for a larger
state). The contestants take turns in one process: fnml's Checkpointer; Orbax alone, asynchronous, as
its documentation shows it, and synchronous; the safetensors package and, where it is installed,
``torch.save``. ``blocked`` is how long the call that saves does not
return. ``delay`` is how much longer than usual the next donated step then takes, which waits for
whoever still reads the old state. The stall is the sum. ``written`` is the time until the library
says that it is done, ``durable`` until every file and directory has been fsynced as well, which
fnml has done by then and the others leave to the user. fnml's restore hashes every byte, the others'
do not. The numbers are random: Orbax compresses, and equal numbers would take it no time.

Targets: stall at most 2 memory copies of the state, durable at most Orbax's, verified restore at
most 1.3 times Orbax's. Peak memory is the largest resident set between the call and its end beyond
that before it.
"""

import argparse
import importlib.util
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
from report import report
from rich import print
from rich.table import Table

from fnml.checkpoint import Checkpointer, restore

State = dict[str, jax.Array]
PAGE = os.sysconf("SC_PAGE_SIZE")
MIB = 2**20


class Contestant(NamedTuple):
    """``save`` returns when the training thread may go on, ``wait`` when the disk has the state."""

    save: Callable[[Path, State], None]
    wait: Callable[[Path], None]
    restore: Callable[[Path, State], Any]


class Turn(NamedTuple):
    """Seconds, and bytes of memory, of one turn."""

    blocked: float
    delay: float
    written: float
    durable: float
    restore: float
    peak: float


def resident() -> int:
    """Return this process's resident set in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


class Peak:
    """Watch the resident set from a thread."""

    def __enter__(self) -> Self:
        self.start = self.most = resident()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.005):
            self.most = max(self.most, resident())

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


def sync(root: Path) -> None:
    """Make everything below a directory durable."""
    for path in (*root.rglob("*"), root):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def ours() -> Contestant:
    """fnml's Checkpointer, kept from save to save as ``fit`` keeps it."""
    kept: dict[str, Checkpointer] = {}

    def save(path: Path, state: State) -> None:
        checkpointer = kept.get("it") or Checkpointer(path, keep_last=1, keep_best=0)
        kept["it"] = checkpointer
        checkpointer.save((checkpointer.latest() or 0) + 1, state, {})

    return Contestant(
        save, lambda _: kept["it"].wait(), lambda path, target: restore(path, target).state
    )


def orbax(*, background: bool) -> Contestant:
    """Orbax alone, with its defaults."""
    make = ocp.AsyncCheckpointer if background else ocp.Checkpointer
    checkpointer = make(ocp.StandardCheckpointHandler())

    def save(path: Path, state: State) -> None:
        checkpointer.save(path / "orbax", args=ocp.args.StandardSave(state), force=True)

    def wait(_: Path) -> None:
        if background:
            checkpointer.wait_until_finished()

    def load(path: Path, target: State) -> Any:
        return checkpointer.restore(path / "orbax", args=ocp.args.StandardRestore(target))

    return Contestant(save, wait, load)


def plain_safetensors() -> Contestant:
    """The safetensors package."""

    def save(path: Path, state: State) -> None:
        safetensors.numpy.save_file({k: np.asarray(x) for k, x in state.items()}, path / "file")

    def load(path: Path, _: State) -> Any:
        return jax.tree.map(jnp.array, safetensors.numpy.load_file(path / "file"))

    return Contestant(save, lambda _: None, load)


def torch_save() -> Contestant:
    """``torch.save`` and ``torch.load``."""
    import torch

    def save(path: Path, state: State) -> None:
        torch.save({k: torch.from_numpy(np.array(x)) for k, x in state.items()}, path / "file")

    def load(path: Path, _: State) -> Any:
        loaded = torch.load(path / "file", weights_only=True)
        return {k: jnp.array(x.numpy()) for k, x in loaded.items()}

    return Contestant(save, lambda _: None, load)


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Return the seconds that a call takes, with what it computes, and its result."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start, result


def turn(
    contestant: Contestant, path: Path, state: State, step: Callable[[State], State]
) -> tuple[Turn, State]:
    """Save, take a step, wait, and restore once."""
    usual = []
    for _ in range(3):
        seconds, state = timed(step, state)
        usual.append(seconds)
    with Peak() as peak:
        start = time.perf_counter()
        contestant.save(path, state)
        blocked = time.perf_counter() - start
        saved = {name: np.array(x[:1]) for name, x in state.items()}
        after, state = timed(step, state)
        contestant.wait(path)
        written = time.perf_counter() - start
        sync(path)
        durable = time.perf_counter() - start
    target = {
        k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for k, x in state.items()
    }
    seconds, loaded = timed(contestant.restore, path, target)
    for name, first in saved.items():
        np.testing.assert_array_equal(loaded[name][:1], first)
    delay = max(after - statistics.median(usual), 0.0)
    return Turn(blocked, delay, written, durable, seconds, peak.most - peak.start), state


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=int, default=200, help="megabytes of the state")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where to write; by default a temporary one")
    parser.add_argument("--json", type=Path, help="where to write the table and the machine")
    options = parser.parse_args()

    arrays = 24
    width = 512
    rows = options.mb * 10**6 // (4 * arrays * width)
    keys = jax.random.split(jax.random.key(0), arrays)
    state = {f"w{i:02}": jax.random.normal(key, (rows, width)) for i, key in enumerate(keys)}
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0.999 + 0.001, s), donate_argnums=0)
    contestants = {
        "fnml": ours(),
        "Orbax, async": orbax(background=True),
        "Orbax, sync": orbax(background=False),
        "safetensors": plain_safetensors(),
    }
    if importlib.util.find_spec("torch"):
        contestants["torch.save"] = torch_save()
    turns: dict[str, list[Turn]] = {name: [] for name in contestants}
    copies = []
    root = Path(tempfile.mkdtemp(dir=options.directory))
    try:
        for number in range(options.turns + 1):
            host = {name: np.asarray(x) for name, x in state.items()}
            to = {name: np.empty_like(x) for name, x in host.items()}
            for _ in range(2):  # the second time without page faults
                start = time.perf_counter()
                for name, x in host.items():
                    np.copyto(to[name], x)
                copy = time.perf_counter() - start
            del host, to
            for name, contestant in contestants.items():
                path = root / name.replace(", ", "-")
                path.mkdir(exist_ok=True)
                measured, state = turn(contestant, path, state, step)
                if number:  # the first turn warms up
                    turns[name].append(measured)
            if number:
                copies.append(copy)
    finally:
        shutil.rmtree(root)

    copy = statistics.median(copies)
    table = Table("", "blocked", "delay", "stall", "copies", "written", "durable", "restore", "MiB")
    for name, measured in turns.items():
        stall = statistics.median(t.blocked + t.delay for t in measured)
        median = Turn(*map(statistics.median, zip(*measured, strict=True)))
        table.add_row(
            name,
            f"{median.blocked:.3f} s",
            f"{median.delay:.3f} s",
            f"{stall:.3f} s",
            f"{stall / copy:.1f}",
            f"{median.written:.2f} s",
            f"{median.durable:.2f} s",
            f"{median.restore:.2f} s",
            f"{median.peak / MIB:.0f}",
        )
    title = f"Saving and restoring {options.mb} MB in {arrays} arrays, one copy {copy:.3f} s"
    report({title: table}, options.json)
    print(f"load {os.getloadavg()[0]:.1f}")
    us, them = turns["fnml"], turns["Orbax, async"]

    def ratio(field: str) -> float:
        pairs = zip(us, them, strict=True)
        return statistics.median(getattr(a, field) / getattr(b, field) for a, b in pairs)

    fields = ("written", "durable", "restore")
    print("against Orbax, async: " + ", ".join(f"{name} {ratio(name):.2f}" for name in fields))


if __name__ == "__main__":
    main()
