"""Find where two runs part: the first step, parameter and example."""

from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fnml.checkpoint import restore, tree_sha256
from fnml.core import DataError, State, step_key
from fnml.recipes._devices import device_count, provide
from fnml.recipes._replay import Replayer, without_keys
from fnml.recipes._run_directory import read_record, read_result
from fnml.recipes._training import differences, read_config
from fnml.sinks import read_jsonl

_LISTED = 8


class Parting(NamedTuple):
    """Where two runs part.

    Attributes:
      config: the fields of recipe, configuration and environment that differ, a line each.
      row: the first row of metrics that differs, in words; ``None`` if all are equal.
      step: the first step (from 1) after which the states differ; 0 if they do before any step;
        ``None`` if none was found.
      parameters: the paths of the state that differ after it.
      examples: what differs between the two batches of that step, or between the losses of their
        examples.
      remarks: what else was seen, a sentence each.
    """

    config: list[str]
    row: str | None
    step: int | None
    parameters: list[str]
    examples: list[str]
    remarks: list[str]

    @property
    def same(self) -> bool:
        """Whether the runs are the same, as far as they go."""
        return self.step is None and self.row is None and not self.remarks


def diff(a: Path, b: Path) -> Parting:
    """Find the first step at which two runs part, and what differs there.

    Rows of metrics and checkpoints that both runs have bound the step; from the last checkpoint
    that is equal in both, both are computed again side by side, with the programs, the data and the
    machine of today. A difference that comes from another machine, or from a fault of it, does
    not show again: then the remarks say whose steps do not lead to its own checkpoint.

    Raises:
      RunError: one of them is no run.
    """
    record_a, record_b = read_record(a), read_record(b)
    fields = [
        f"{name}: {one!r} in {a}, {two!r} in {b}"
        for part in ("recipe", "config", "environment")
        for name, one, two in differences(record_a.get(part), record_b.get(part), part)
    ]
    row_step, row = _first_row(a, b)
    # JAX starts with as many devices as it is first asked for.
    provide(max(device_count(read_config(record)[1].run) for record in (record_a, record_b)))
    one, two = Replayer(a), Replayer(b)

    def parting(step: int | None, parameters: list[str], examples: list[str], *remarks: str) -> Any:
        return Parting(fields, row, step, parameters, examples, list(remarks))

    start_a, start_b = one.state_at(0), two.state_at(0)
    if unequal := _unequal(start_a, start_b):
        return parting(0, unequal, [], "they part before the first step: other initial arrays")
    low, high = _bounds(one, two)
    if high is None:
        high = row_step
    if high is None:
        ends = [(read_result(run) or {}).get("params_sha256") for run in (a, b)]
        if ends[0] == ends[1] or None in ends:
            return parting(None, [], [])
        high = max(read_result(run)["step"] for run in (a, b))  # type: ignore[index]
    state_a, state_b = one.state_at(low), two.state_at(low)
    for step in range(low + 1, high + 1):
        before = state_a
        state_a, means_a = one.advance(state_a, step)
        state_b, means_b = two.advance(state_b, step)
        if unequal := _unequal(state_a, state_b):
            found, remark = _examples(one, two, before, step, means_a, means_b)
            return parting(step, unequal, found, remark)
    return parting(None, [], [], *_not_again(one, two, state_a, low, high))


def _first_row(a: Path, b: Path) -> tuple[int | None, str | None]:
    """Return the step of the first row that differs, and what differs; rows beyond one end do not."""
    try:
        rows = [read_jsonl(run / "metrics.jsonl") for run in (a, b)]
    except DataError as error:
        return None, f"the rows cannot be compared: {error}"
    for one, two in zip(*rows, strict=False):
        if (one.step, one.kind) != (two.step, two.kind):
            return max(one.step, two.step), (
                f"{one.kind} row of step {one.step} in {a}, {two.kind} row of step {two.step} in {b}"
            )
        unequal = [
            f"{name} {one.values.get(name)!r} and {two.values.get(name)!r}"
            for name in sorted(one.values.keys() | two.values.keys())
            if repr(one.values.get(name)) != repr(two.values.get(name))
        ]
        if unequal:
            return one.step, f"{one.kind} row of step {one.step}: {', '.join(unequal)}"
    return None, None


def _bounds(one: Replayer, two: Replayer) -> tuple[int, int | None]:
    """Return the last step with equal checkpoints in both runs, and the first with unequal ones."""
    common = sorted(set(one.steps) & set(two.steps))
    low, high = 0, len(common)
    # Runs that have parted stay parted.
    while low < high:
        middle = (low + high) // 2
        if _sha256(one, common[middle]) == _sha256(two, common[middle]):
            low = middle + 1
        else:
            high = middle
    return (common[low - 1] if low else 0), (common[high] if high < len(common) else None)


def _sha256(run: Replayer, step: int) -> str:
    return tree_sha256(restore(run.directory / "checkpoints", step=step).state)


def _unequal(a: State, b: State) -> list[str]:
    """List the paths at which two states differ, in bits, shape or presence."""
    one, two = without_keys(a), without_keys(b)
    return [
        name
        for name in dict.fromkeys((*one, *two))
        if name not in one or name not in two or not _same(one[name], two[name])
    ]


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype) and a.tobytes() == b.tobytes()


def _examples(
    one: Replayer,
    two: Replayer,
    state: State,
    step: int,
    means_a: Mapping[str, float],
    means_b: Mapping[str, float],
) -> tuple[list[str], str]:
    """Say which examples of a step differ, or else on which of them the losses do."""
    batch_a, batch_b = one.batch(step), two.batch(step)
    lines = []
    pairs = zip_longest(one.examples(step).tolist(), two.examples(step).tolist())
    for i, (number_a, number_b) in enumerate(pairs):
        if number_a != number_b:
            lines.append(f"example {i} of the batch: number {number_a} and number {number_b}")
        elif batch_a.keys() != batch_b.keys() or not all(
            _same(batch_a[name][i], batch_b[name][i]) for name in batch_a
        ):
            lines.append(f"example {i} of the batch: number {number_a}, with other content")
    if lines:
        return _short(lines), "the same state learns from other examples"
    losses = [_losses(run, state, batch_a, step) for run in (one, two)]
    lines = [
        f"example {i} of the batch, number {number}: loss {x!r} and {y!r} on its own"
        for i, (number, x, y) in enumerate(zip(one.examples(step).tolist(), *losses, strict=True))
        if repr(x) != repr(y)
    ]
    if lines:
        return _short(lines), "the same state and examples give other losses"
    if repr(dict(means_a)) != repr(dict(means_b)):
        return [], (
            f"the same state and examples give other metrics, {dict(means_a)} and {dict(means_b)}, "
            "but not example by example: the layout or the random draws differ"
        )
    return [], "the same state, examples and losses give another update: look at the optimizer"


def _losses(run: Replayer, state: State, batch: Mapping[str, Any], step: int) -> list[float]:
    """Compute each example's loss on its own, with the step's key."""
    options = {"state": state.model_state} if jax.tree.leaves(state.model_state) else {}
    loss = jax.jit(lambda params, one, key: run.task.loss_fn(params, one, key, **options)[0])
    key = step_key(state.key, step - 1)
    count = len(next(iter(batch.values())))
    return [
        float(loss(state.params, {name: x[i : i + 1] for name, x in batch.items()}, key))
        for i in range(count)
    ]


def _not_again(one: Replayer, two: Replayer, state: State, low: int, high: int) -> Iterator[str]:
    yield f"computed again, steps {low + 1} to {high} are the same in both"
    expected = tree_sha256(without_keys(state))
    for run in (one, two):
        if high in run.steps and _sha256(run, high) != expected:
            yield (
                f"{run.directory} does not come to its own checkpoint of step {high} when its steps "
                f"from {low} on are computed again: they were computed by another program or "
                "machine, or wrongly"
            )


def _short(lines: list[str]) -> list[str]:
    more = [f"and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    return lines[:_LISTED] + more
