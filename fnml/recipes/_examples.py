"""Examples for a model from elsewhere: a file of arrays, checked against what the model takes."""

import keyword
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fnml.checkpoint import load_npz
from fnml.core import CheckpointError, ConfigError, DataError, nearest
from fnml.data import ArraySource

TARGETS = "targets"
# Names that a batch and a recipe's predict have already.
_TAKEN = frozenset(("mask", "params", "state", TARGETS))


class Examples(NamedTuple):
    """What a model is trained on or measured by.

    Attributes:
      source: one field for each input, and ``targets``.
      fields: the inputs' fields, in the model's order: their names as Python would write them.
    """

    source: ArraySource
    fields: tuple[str, ...]


def fixed_rows(ports: Sequence[Any]) -> int | None:
    """Return how many examples a model takes at once, ``None`` if that is open.

    Raises:
      ConfigError: an input has no axis of examples, or they fix different numbers of them.
    """
    faults = [
        f"{port.name}: expected a tensor whose first axis counts examples"
        for port in ports
        if port.kind != "tensor" or port.dtype == object or port.shape == ()
    ]
    rows = {
        port.name: port.shape[0] for port in ports if port.shape and isinstance(port.shape[0], int)
    }
    if len(set(rows.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in rows.items())
        faults.append(f"the inputs fix different numbers of examples: {listed}")
    if faults or not ports:
        raise ConfigError(
            "the model cannot be given batches of examples: "
            + ("; ".join(faults) or "it takes no input")
        )
    return next(iter(rows.values()), None)


def read_examples(path: Path, ports: Sequence[Any]) -> Examples:
    """Read ``{input: [N, ...], "targets": [N, ...]}`` from an npz file.

    Arrays are converted to the dtypes in which the model is computed, if no number changes by
    more than a rounding.

    Args:
      path: the file.
      ports: the model's inputs, as :func:`fnml.from_onnx` describes them.

    Raises:
      ConfigError: an input has the name of the targets.
      DataError: the file cannot be read, or its arrays are not what the model takes; all
        differences are listed.
    """
    names = [port.name for port in ports]
    if TARGETS in names:
        raise ConfigError(
            f"the model has an input {TARGETS!r}, the name of the targets: rename the input"
        )
    arrays = _read(path)
    wanted = [*names, TARGETS]
    faults = [f"{name}: not there.{nearest(name, arrays)}" for name in wanted if name not in arrays]
    faults += [
        f"{name}: the model takes no such input.{nearest(name, wanted)}"
        for name in arrays
        if name not in wanted
    ]
    inputs: dict[str, np.ndarray] = {}
    for port, field in zip(ports, fields_of(names), strict=True):
        if port.name in arrays:
            inputs[field] = _fitted(port, arrays[port.name], faults)
    if faults:
        raise DataError(f"{path} does not fit the model:\n" + "\n".join(faults))
    return Examples(ArraySource({**inputs, TARGETS: arrays[TARGETS]}), tuple(inputs))


def fit_targets(examples: Examples, output: Any, loss: str) -> Examples:
    """Check the targets against what the model puts out, and convert them for the loss.

    Args:
      examples: with targets as they are in the file.
      output: shape and dtype of the model's first output for some number of examples.
      loss: ``"cross_entropy"``: class numbers ``[N, ...]`` for logits ``[N, ..., C]``; ``"mse"``:
        numbers of the output's own shape.

    Raises:
      DataError: the targets do not fit.
    """
    arrays = dict(examples.source.arrays)
    targets = arrays[TARGETS]
    classes = loss == "cross_entropy"
    shape = output.shape[1:-1] if classes else output.shape[1:]
    faults = []
    if not output.shape or (classes and len(output.shape) < 2):
        faults.append(f"the model's output {list(output.shape)} has no axis of classes")
    elif targets.shape[1:] != shape:
        faults.append(f"targets {list(targets.shape)}, expected {['N', *shape]}")
    if targets.dtype.kind not in ("iu" if classes else "fiub"):
        kind = "class numbers" if classes else "numbers"
        faults.append(f"targets of {targets.dtype}, expected {kind}")
    elif classes and output.shape and targets.size:
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= output.shape[-1]:
            faults.append(
                f"targets from {low} to {high}, expected 0 to {output.shape[-1] - 1}: the model "
                f"has {output.shape[-1]} classes"
            )
    if faults:
        raise DataError(f"for {loss} of an output {list(output.shape)}: " + "; ".join(faults))
    arrays[TARGETS] = targets.astype(np.int32 if classes else np.float32)
    return examples._replace(source=ArraySource(arrays))


def fields_of(names: Sequence[str]) -> tuple[str, ...]:
    """Return names that Python functions can have as parameters, all different.

    >>> fields_of(["x", "input.1", "input/1", "mask", "0"])
    ('x', 'input_1', 'input_1_', 'mask_', '_0')
    """
    fields: list[str] = []
    for name in names:
        field = re.sub(r"\W", "_", name, flags=re.ASCII) or "_"
        field = f"_{field}" if field[0].isdigit() else field
        while field in _TAKEN or field in fields or keyword.iskeyword(field):
            field += "_"
        fields.append(field)
    return tuple(fields)


def _read(path: Path) -> Mapping[str, np.ndarray]:
    try:
        return load_npz(path)
    except CheckpointError as error:
        raise DataError(f"the examples cannot be read: {error}") from error


def _fitted(port: Any, array: np.ndarray, faults: list[str]) -> np.ndarray:
    """Return the array in the dtype that the input is computed in; note what does not fit."""
    from fnml.interop.onnx._dtypes import canonical

    shape = port.shape
    if shape is not None and (
        array.ndim != len(shape)
        or any(
            isinstance(a, int) and a != b for a, b in zip(shape[1:], array.shape[1:], strict=True)
        )
    ):
        sizes = ", ".join("?" if size is None else str(size) for size in ("N", *shape[1:]))
        faults.append(f"{port.name}: expected [{sizes}], got {list(array.shape)}")
    target = canonical(array.dtype if port.dtype is None else port.dtype)
    if not np.can_cast(array.dtype, target, "same_kind"):
        faults.append(f"{port.name}: expected {port.dtype or target}, got {array.dtype}")
        return array
    if target.kind in "iu" and array.size:
        info, low, high = np.iinfo(target), int(array.min()), int(array.max())
        if low < info.min or high > info.max:
            faults.append(f"{port.name}: {low} to {high} does not fit into {target}")
    return array.astype(target, copy=False)


def rows_of(examples: Mapping[str, np.ndarray], rows: int, fields: Sequence[str]) -> list[Any]:
    """Describe a batch of ``rows`` examples."""
    return [
        jax.ShapeDtypeStruct((rows, *examples[field].shape[1:]), examples[field].dtype)
        for field in fields
    ]
