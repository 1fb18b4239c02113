"""``fnml doctor``."""

import importlib.util
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import tyro
from rich.table import Table

import fnml
from fnml.cli._show import show
from fnml.core import can_keep_memory
from fnml.pallas_kernels import native_faults
from fnml.recipes import environment

_CORE = ("flax", "orbax-checkpoint", "chex", "rich", "tyro", "safetensors", "flatbuffers")
_EXTRAS = {
    "bpe": ("tokenizers", "train byte-pair tokens: fnml train lm --tokens bpe"),
    "onnx": ("onnx", "read and write ONNX files: from_onnx, to_onnx, fnml export"),
    "tensorboard": ("tensorboard", "write TensorBoard event files"),
    "prometheus": ("prometheus_client", "serve metrics to Prometheus"),
    "notebooks": ("nbclient", "execute the notebooks"),
}


@dataclass(frozen=True)
class Doctor:
    """Show versions, devices and limits of this machine, and what is missing."""


def command(arguments: Sequence[str]) -> int:
    """Print what was found; return 1 if a core package is missing."""
    tyro.cli(Doctor, args=arguments, prog="fnml doctor")
    table = Table("what", "found", "note")
    for name, value in environment().items():
        table.add_row(name, ", ".join(value) if isinstance(value, list) else str(value), "")
    missing = []
    for package in _CORE:
        try:
            table.add_row(package, metadata.version(package), "")
        except metadata.PackageNotFoundError:
            missing.append(package)
            table.add_row(package, "missing", f"pip install {package}")
    for extra, (module, purpose) in _EXTRAS.items():
        there = importlib.util.find_spec(module) is not None
        cure = "" if there else f": pip install 'fnml[{extra}]'"
        table.add_row(f"extra {extra}", "there" if there else "missing", purpose + cure)
    free = shutil.disk_usage(Path.cwd()).free
    note = "little room for checkpoints" if free < 1 << 30 else ""
    table.add_row("free disk here", f"{free / (1 << 30):.1f} GiB", note)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    table.add_row("memory", f"{memory / (1 << 30):.1f} GiB", "")
    place, note = fnml.compilation_cache()
    found = "off" if place is None else f"{place} ({_size(place)})"
    table.add_row("compilation cache", found, note)
    reason = can_keep_memory()
    table.add_row(
        "keeping memory",
        "can" if reason is None else "cannot",
        reason or "speeds up steps on a CPU: fnml train RECIPE --keep-memory, fnml.keep_memory()",
    )
    faults = native_faults()
    table.add_row(
        "C++ kernels",
        "cannot be built" if faults else "can be built",
        "; ".join(faults) or "speed up float32 on a CPU: fnml train RECIPE --native",
    )
    show(table)
    return int(bool(missing))


def _size(place: Path) -> str:
    sizes = [path.stat().st_size for path in place.glob("*-cache")] if place.is_dir() else []
    return f"{len(sizes)} programs, {sum(sizes) / (1 << 20):.1f} MiB"
