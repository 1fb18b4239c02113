"""Check everything that a run directory holds against what it says of itself."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fnml.checkpoint import Fault, restore, restore_meta, tree_sha256, verify
from fnml.core import CheckpointError, DataError, RunError
from fnml.recipes._run_directory import read_record, read_result
from fnml.sinks import read_jsonl


class Finding(NamedTuple):
    """What is wrong, and with which file or step."""

    where: str
    problem: str


class Verified(NamedTuple):
    """What a scan found.

    Attributes:
      steps: the faults of each checkpoint; an empty list means that it is whole.
      findings: everything that is wrong, those faults included.
    """

    steps: dict[int, list[Fault]]
    findings: list[Finding]


def verify_run(directory: Path) -> Verified:
    """Scan a run directory: every file of every checkpoint, the record, the result and the rows.

    Checked are each file's presence, size and SHA-256; that the data position saved with a step is
    that step's; that each row is there once; and that the result's hash is that of the parameters
    in its checkpoint.

    Raises:
      RunError: ``directory`` holds neither a run nor checkpoints.
    """
    if (directory / "config.json").exists():
        checkpoints = directory / "checkpoints"
        steps = verify(checkpoints) if checkpoints.is_dir() else {}
        findings = [*_of_steps(steps), *_of_record(directory, steps), *_of_rows(directory)]
        return Verified(steps, findings)
    steps = verify(directory) if directory.is_dir() else {}
    if not steps:
        raise RunError(f"{directory} holds neither a run nor checkpoints: 'fnml runs' lists runs")
    return Verified(steps, list(_of_steps(steps)))


def _of_steps(steps: Mapping[int, list[Fault]]) -> Iterator[Finding]:
    for step, faults in steps.items():
        for fault in faults:
            yield Finding(f"step {step}", f"{fault.file} {fault.problem}")


def _of_record(directory: Path, steps: Mapping[int, list[Fault]]) -> Iterator[Finding]:
    checkpoints = directory / "checkpoints"
    try:
        run: Any = read_record(directory)["config"].get("run")
        batch = run.get("batch_size") if isinstance(run, Mapping) else None
    except RunError as error:
        yield Finding("config.json", str(error))
        batch = None
    for step in (step for step, faults in steps.items() if not faults):
        try:
            data = restore_meta(checkpoints, step).get("data")
        except CheckpointError as error:
            yield Finding(f"step {step}", str(error))
            continue
        position = data.get("position") if isinstance(data, Mapping) else None
        if type(batch) is int and position is not None and position != step * batch:
            yield Finding(
                f"step {step}", f"{position} examples are counted, expected {step * batch}"
            )
    try:
        result = read_result(directory)
    except RunError as error:
        yield Finding("result.json", str(error))
        return
    if result is None:
        return
    step, expected = result["step"], result["params_sha256"]
    if steps.get(step, [None]):
        yield Finding("result.json", f"its step {step} has no whole checkpoint")
    elif (actual := _params_sha256(checkpoints, step)) != expected:
        yield Finding(
            "result.json", f"its params_sha256 is {expected}, the checkpoint's is {actual}"
        )


def _params_sha256(checkpoints: Path, step: int) -> str:
    try:
        arrays = restore(checkpoints, step=step, only="params/**").state
    except (CheckpointError, ValueError) as error:
        return f"unreadable ({error})"
    return tree_sha256({name.removeprefix("params/"): x for name, x in arrays.items()})


def _of_rows(directory: Path) -> Iterator[Finding]:
    path = directory / "metrics.jsonl"
    if not path.exists():
        return
    try:
        rows = read_jsonl(path)
    except DataError as error:
        yield Finding(path.name, str(error))
        return
    twice = [
        key for key, times in Counter((row.step, row.kind) for row in rows).items() if times > 1
    ]
    if twice:
        listed = ", ".join(f"{kind} {step}" for step, kind in twice[:5])
        yield Finding(path.name, f"{len(twice)} rows are there more than once: {listed}")
    for kind in ("train", "eval"):
        order = [row.step for row in rows if row.kind == kind]
        if order != sorted(order):
            yield Finding(path.name, f"the {kind} rows are not in the order of their steps")
