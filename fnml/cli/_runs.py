"""``fnml runs [RUN ...]``."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.table import Table

from fnml.cli._show import show
from fnml.core import RunError
from fnml.recipes import read_record, read_result


@dataclass(frozen=True)
class Runs:
    """List the runs below runs/, or compare some: their settings that differ, and their metrics."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run directories to compare, or one directory to list the runs of; by default runs/."""


def command(arguments: Sequence[str]) -> int:
    """Print a table of runs."""
    parsed = tyro.cli(Runs, args=arguments, prog="fnml runs")
    paths = parsed.runs or (Path("runs"),)
    single = len(paths) == 1 and not (paths[0] / "config.json").exists()
    if not single:
        show(_comparison(paths))
        return 0
    if not paths[0].is_dir():
        raise RunError(f"there is no directory {paths[0]}: 'fnml train' makes runs below runs/")
    found = sorted(path.parent for path in paths[0].glob("*/config.json"))
    if not found:
        raise RunError(f"there are no runs below {paths[0]}: 'fnml train' makes one")
    show(_listing(found))
    return 0


def _listing(directories: Sequence[Path]) -> Table:
    table = Table("run", "recipe", "steps", "status", "held-out", "seconds", "params")
    for directory in directories:
        try:
            record, result = read_record(directory), read_result(directory)
        except RunError as error:
            table.add_row(str(directory), "", "", f"unreadable: {error}")
            continue
        wanted = dict(_flat(record["config"])).get("run.steps", "?")
        if result is None:
            steps = _newest(directory)
            table.add_row(str(directory), record["recipe"], f"{steps}/{wanted}", "unfinished")
            continue
        metrics = ", ".join(f"{k} {v:.4g}" for k, v in result.get("eval", {}).items())
        table.add_row(
            str(directory),
            record["recipe"],
            f"{result.get('step')}/{wanted}",
            "stopped early" if result.get("stopped") else "finished",
            metrics,
            f"{result.get('seconds', 0):.1f}",
            str(result.get("params_sha256", ""))[:12],
        )
    return table


def _newest(directory: Path) -> int:
    names = [path.name for path in (directory / "checkpoints").glob("[0-9]*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def _comparison(directories: Sequence[Path]) -> Table:
    table = Table("", *(str(directory) for directory in directories))
    columns = []
    for directory in directories:
        record, result = read_record(directory), read_result(directory) or {}
        shown = {"recipe": record["recipe"], **dict(_flat(record["config"]))}
        shown |= {f"train {k}": f"{v:.6g}" for k, v in result.get("train", {}).items()}
        shown |= {f"held-out {k}": f"{v:.6g}" for k, v in result.get("eval", {}).items()}
        shown |= {k: str(result[k]) for k in ("step", "seconds", "params_sha256") if k in result}
        columns.append(shown)
    for name in dict.fromkeys(name for column in columns for name in column):
        cells = [column.get(name, "-") for column in columns]
        if len(columns) == 1 or len(set(cells)) > 1 or name == "recipe" or " " in name:
            table.add_row(name, *cells)
    return table


def _flat(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", str(value)
