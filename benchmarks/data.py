"""How fast do batches come, beside NumPy by hand and PyTorch's loader?

Run: ``python benchmarks/data.py`` (about half a minute). 60,000 images of 28x28 bytes, shuffled, in
batches of 128, normalised to float32. With ``FNML_TORCH_PYTHON`` (or ``--torch``) naming an
interpreter that has PyTorch, its ``DataLoader`` takes its turns in a process of its own: with a
sampler that fetches whole batches, and record by record as it does by default.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from report import report
from rich.table import Table

from fnml.data import ArraySource, Batches

COUNT, SIZE = 60_000, 128
TORCH = """
import sys, time, torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
torch.set_num_threads(2)
x = torch.randint(0, 256, (60000, 28, 28), dtype=torch.uint8)
y = torch.arange(60000)
class Whole(TensorDataset):
    def __getitem__(self, i):
        return super().__getitem__(torch.as_tensor(i))
data = Whole(x, y)
loaders = {
    "batched": DataLoader(data, sampler=BatchSampler(RandomSampler(data), 128, True), batch_size=None),
    "default": DataLoader(TensorDataset(x, y), 128, shuffle=True, drop_last=True),
}
for line in sys.stdin:
    name, count = line.split()
    began = time.perf_counter()
    for i, (image, label) in enumerate(loaders[name]):
        image.float().div_(255)
        if i + 1 == int(count):
            break
    print((i + 1) * 128 / (time.perf_counter() - began), flush=True)
"""


def by_hand(images: np.ndarray, labels: np.ndarray, count: int) -> None:
    """Gather batches as one writes it without a library."""
    order = np.random.default_rng(0).permutation(COUNT)
    for i in range(count):
        at = order[i * SIZE : (i + 1) * SIZE]
        images[at].astype(np.float32) / np.float32(255), labels[at]


def ours(images: np.ndarray, labels: np.ndarray, count: int, threaded: bool) -> None:
    """Take them from ``Batches``."""

    def normalise(batch: dict, positions: np.ndarray) -> dict:
        return {"x": batch["x"].astype(np.float32) / np.float32(255), "y": batch["y"]}

    source = Batches(ArraySource({"x": images, "y": labels}), SIZE, map=normalise)
    with source.feed([None] * count, place=lambda x: x, threaded=threaded) as feed:
        for _ in feed:
            pass


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--torch", default=os.environ.get("FNML_TORCH_PYTHON"))
    parser.add_argument("--json", type=Path, help="where to write the table and the machine")
    options = parser.parse_args()
    images = np.random.default_rng(0).integers(0, 256, (COUNT, 28, 28)).astype(np.uint8)
    labels, count = np.arange(COUNT), 400

    def rate(function: Callable[[], None]) -> Callable[[], float]:
        def run() -> float:
            began = time.perf_counter()
            function()
            return count * SIZE / (time.perf_counter() - began)

        return run

    contestants = {
        "fnml": rate(lambda: ours(images, labels, count, False)),
        "fnml, thread": rate(lambda: ours(images, labels, count, True)),
        "NumPy by hand": rate(lambda: by_hand(images, labels, count)),
    }
    process = None
    if options.torch:
        process = subprocess.Popen(
            [options.torch, "-c", TORCH], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

        def ask(name: str, count: int) -> float:
            process.stdin.write(f"{name} {count}\n")
            process.stdin.flush()
            return float(process.stdout.readline())

        contestants["PyTorch, whole batches"] = lambda: ask("batched", 400)
        contestants["PyTorch, as by default"] = lambda: ask("default", 40)
    else:
        print("PyTorch is left out: FNML_TORCH_PYTHON names no Python with it", file=sys.stderr)
    turns = []
    for turn in range(options.rounds + 1):
        names = list(contestants) if turn % 2 else list(contestants)[::-1]
        turns.append({name: contestants[name]() for name in names})
    table = Table("contestant", "examples/s", "lowest", "highest", "ratio to NumPy by hand")
    for name in contestants:
        rates = [turn[name] for turn in turns[1:]]  # the first turn warms up
        ratio = statistics.median(turn[name] / turn["NumPy by hand"] for turn in turns[1:])
        cells = [statistics.median(rates), min(rates), max(rates)]
        table.add_row(name, *[f"{x:,.0f}" for x in cells], f"{ratio:.2f}")
    report({f"Shuffled, normalised batches ({options.rounds} rounds)": table}, options.json)
    if process is not None:
        process.stdin.close()
        process.wait()


if __name__ == "__main__":
    main()
