"""``fnml bench [SUITE ...]``."""

import json
import os
import re
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

import fnml
from fnml.core import ConfigError, DataError, RunError, write_atomic

Suite = Literal[
    "steps",
    "loop",
    "optimizer",
    "precision",
    "data",
    "checkpoint",
    "kernels",
    "transforms",
    "runtimes",
    "startup",
    "compile",
]


class _Script(NamedTuple):
    """A suite's script in ``benchmarks/``, and its option for the number of rounds."""

    name: str
    rounds: str = "--rounds"


_SCRIPTS: Mapping[Suite, _Script] = {
    "steps": _Script("peers.py"),
    "loop": _Script("overhead.py"),
    "optimizer": _Script("flat_optimizer.py"),
    "precision": _Script("low_precision.py"),
    "data": _Script("data.py"),
    "checkpoint": _Script("checkpoint.py", "--turns"),
    "kernels": _Script("kernels_cpu.py"),
    "transforms": _Script("transforms.py"),
    "runtimes": _Script("onnx_import.py"),
    "startup": _Script("startup.py"),
    "compile": _Script("compile_time.py"),
}
# The peers' own environments: the variable that names each one's Python, and what is in it.
_PEERS = {
    "torch": ("FNML_TORCH_PYTHON", ("torch==2.13.0", "numpy", "safetensors")),
    "jax": (
        "FNML_PEERS_PYTHON",
        (
            "jax==0.10.2",
            "flax==0.12.8",
            "optax==0.2.8",
            "equinox==0.13.8",
            "dm-haiku==0.0.17",
            "keras==3.15.1",
        ),
    ),
}
_BLOCK = re.compile(r"<!-- bench:(\w+) -->\n.*?<!-- /bench:\1 -->", re.DOTALL)
_SHOWN = ("processor", "cpus", "python", "jax", "torch", "onnxruntime")


@dataclass(frozen=True)
class Bench:
    """Measure fnml beside its peers; each suite writes one table, as Markdown and as JSON.

    The suites are the scripts in benchmarks/, so this needs a clone of the repository. Contestants
    take turns; a table has medians, the range, and ratios to a named peer.
    """

    suites: Annotated[tuple[Suite, ...], tyro.conf.Positional] = ()
    """What to measure."""
    out: Path = Path("bench")
    """The folder for SUITE.md and SUITE.json."""
    rounds: int = 0
    """How often everybody takes a turn; 0 for what each script thinks right."""
    peers: Path | None = None
    """The folder that --install-peers was given."""
    install_peers: Path | None = None
    """Install PyTorch and the other JAX libraries into environments of their own in this folder."""
    tables: bool = False
    """Write the tables in README.md and docs/ again, from benchmarks/results/SUITE.json."""

    def __post_init__(self) -> None:
        if self.rounds < 0:
            raise ConfigError(f"rounds={self.rounds}: expected at least 0")
        if not (self.suites or self.install_peers or self.tables):
            raise ConfigError(f"name a suite: {', '.join(_SCRIPTS)}")


def command(arguments: Sequence[str]) -> int:
    """Do what is asked for, in this order: install peers, measure, write the tables again."""
    options = tyro.cli(Bench, args=arguments, prog="fnml bench")
    peers = options.peers
    if options.install_peers:
        peers = options.install_peers
        install_peers(peers)
    scripts = Path(fnml.__file__).resolve().parents[1] / "benchmarks"
    if (options.suites or options.tables) and not scripts.is_dir():
        raise RunError(
            f"{scripts} is not there: the benchmarks are in fnml's repository and not in the wheel. "
            "Clone it and install it with 'pip install -e .'"
        )
    for suite in options.suites:
        print(_run(scripts, suite, options.out, options.rounds, peers))
    if options.tables:
        for path in (scripts.parent / "README.md", *sorted((scripts.parent / "docs").glob("*.md"))):
            old = path.read_text(encoding="utf-8")
            new = with_tables(old, scripts / "results")
            if new != old:
                write_atomic(path, new.encode())
                print(path)
    return 0


def install_peers(folder: Path) -> None:
    """Make an environment for each group of peers, and say how to use them.

    Raises:
      RunError: something cannot be installed.
    """
    for name, (variable, packages) in _PEERS.items():
        place = folder.absolute() / name
        venv.create(place, with_pip=True)
        python = place / "bin" / "python"
        print(f"{place}: {', '.join(packages)}", flush=True)
        run = subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=False)
        if run.returncode:
            raise RunError(f"pip could not install {', '.join(packages)} in {place}: see above")
        print(f"export {variable}={python}")


def _run(scripts: Path, suite: Suite, out: Path, rounds: int, peers: Path | None) -> str:
    """Run one suite's script, and write its table as Markdown beside its JSON."""
    script = _SCRIPTS[suite]
    result = out.absolute() / f"{suite}.json"
    result.parent.mkdir(parents=True, exist_ok=True)
    settings = {}
    for name, (variable, _) in _PEERS.items():
        python = None if peers is None else peers.absolute() / name / "bin" / "python"
        if python is not None and python.exists():
            settings[variable] = str(python)
    more = [script.rounds, str(rounds)] if rounds else []
    line = [sys.executable, str(scripts / script.name), *more, "--json", str(result)]
    # What it prints meanwhile is for those who wait; the table comes from the JSON.
    run = subprocess.run(line, check=False, env={**os.environ, **settings}, stdout=sys.stderr)
    if run.returncode:
        raise RunError(f"the suite {suite} failed (exit code {run.returncode}): its error is above")
    text = markdown(_read(result))
    write_atomic(result.with_suffix(".md"), text.encode())
    return text


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def with_tables(text: str, results: Path) -> str:
    """Return a document with what is between ``<!-- bench:SUITE -->`` marks made from the results.

    Raises:
      DataError: the results of a suite that is marked cannot be read.
    """

    def block(match: re.Match[str]) -> str:
        name = match[1]
        table = markdown(_read(results / f"{name}.json"))
        return f"<!-- bench:{name} -->\n{table}<!-- /bench:{name} -->"

    return _BLOCK.sub(block, text)


def markdown(report: Mapping[str, Any]) -> str:
    """Write what a benchmark reports as Markdown.

    >>> table = {"title": "Speed", "columns": ["who", "ms"], "rows": [["we", "1.0"]]}
    >>> report = {"command": "python x.py", "machine": {"cpus": "2"}, "tables": [table]}
    >>> print(markdown(report), end="")
    **Speed**
    <BLANKLINE>
    | who | ms |
    |---|---|
    | we | 1.0 |
    <BLANKLINE>
    `python x.py`: cpus 2.
    """
    lines = []
    for table in report["tables"] if "tables" in report else _of_peers(report):
        lines += [f"**{table['title']}**", "", _row(table["columns"])]
        lines += ["|" + "---|" * len(table["columns"]), *map(_row, table["rows"]), ""]
    machine = report["machine"]
    on = ", ".join(f"{name} {machine[name]}" for name in _SHOWN if name in machine)
    lines.append(f"`{report.get('command', 'python benchmarks/peers.py')}`: {on}.")
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _of_peers(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the tables of ``benchmarks/peers.py``, whose report holds numbers."""
    columns = [
        "",
        "ms",
        "range",
        "share of the matrix product",
        "peak MiB",
        "first step, s",
        "loss",
    ]
    tables = []
    for name, found in report["rows"].items():
        facts = [f"matrix product: {found['matmul_gflops']:.0f} GFLOP/s"]
        facts += [f"{key.replace('_', ' ')}: {x:.2f}" for key, x in found["ratios"].items()]
        rows = [
            [
                peer,
                f"{x['ms']:.2f}",
                f"{x['ms_range'][0]:.2f}-{x['ms_range'][1]:.2f}",
                f"{x['share_of_matmul']:.0%}",
                f"{x['peak_mib']:.0f}",
                f"{x['first_step_s']:.1f}",
                f"{x['loss']:.5f}",
            ]
            for peer, x in found["peers"].items()
        ]
        tables.append({"title": f"{name} ({', '.join(facts)})", "columns": columns, "rows": rows})
    return tables
