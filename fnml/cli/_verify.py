"""``fnml verify RUN`` and ``fnml verify crash RECIPE``."""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import tyro
from rich.table import Table

from fnml.cli._crash import Report, crash
from fnml.cli._show import show
from fnml.core import ConfigError
from fnml.recipes import find_recipe, verify_run


@dataclass(frozen=True)
class Verify:
    """Check every file of a run's checkpoints by SHA-256, its record and its rows.

    The exit code is 1 if anything is damaged. 'fnml verify crash RECIPE --help' tells of the other
    use: to kill a recipe's run again and again, and see whether it ends with the same bits.
    """

    run: tyro.conf.Positional[Path]
    """The run directory, or a directory of checkpoints."""


def command(arguments: Sequence[str]) -> int:
    """Check a run, or kill one; return 1 if something is not as it should be."""
    if arguments and arguments[0] == "crash":
        return _crash(arguments[1:])
    parsed = tyro.cli(Verify, args=arguments, prog="fnml verify")
    found = verify_run(parsed.run)
    table = Table("checkpoint", "state")
    for step, faults in found.steps.items():
        table.add_row(f"step {step}", f"damaged: {len(faults)}" if faults else "whole")
    show(table)
    for finding in found.findings:
        print(f"{finding.where}: {finding.problem}")
    if not found.findings:
        print(f"{parsed.run}: nothing is damaged")
    return int(bool(found.findings))


def _crash(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fnml verify crash",
        allow_abbrev=False,
        description="Train a recipe once without interruption, then kill its run at random "
        "instants and at chosen ones (compiling, in a save, between manifest and rename, while "
        "rows are written, ...), resuming each time, and compare: parameters, every checkpoint "
        "that a run goes on from, data position, and the rows of metrics. Exit code 1 if anything "
        "differs.",
        epilog="All other options are the recipe's own, as for 'fnml train RECIPE'; those after "
        "'--' are the recipe's in any case (its --seed, say). Save often (--save-every), so that "
        "there is much to interrupt.",
    )
    parser.add_argument("recipe", help="digits, lm, or a plugin's")
    parser.add_argument("--kills", type=int, default=20, help="processes to kill (20)")
    parser.add_argument("--seed", type=int, default=0, help="decides the instants (0)")
    parser.add_argument("--grace", type=float, default=60.0, help="seconds to end after SIGTERM")
    parser.add_argument(
        "--out", type=Path, help="keep the runs in this new directory; by default none is kept"
    )
    arguments = list(arguments)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    options, rest = parser.parse_known_args(arguments[:cut])
    rest += arguments[cut + 1 :]
    if options.kills < 1 or options.seed < 0 or not options.grace > 0:
        raise ConfigError("expected --kills of at least 1, --seed of at least 0, --grace above 0")
    if "--out" in rest or "--keep-last" in rest:
        raise ConfigError("--out and --keep-last are not the recipe's to set here: leave them out")
    find_recipe(options.recipe)
    if options.out is not None and options.out.exists() and any(options.out.iterdir()):
        raise ConfigError(f"{options.out} is not empty: choose another directory with --out")
    # This process only compares; the accelerator is the runs' own.
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory(prefix="fnml-crash-") as scratch:
        root = options.out or Path(scratch)
        root.mkdir(parents=True, exist_ok=True)
        report = crash(
            options.recipe,
            rest,
            root.absolute(),
            kills=options.kills,
            seed=options.seed,
            grace=options.grace,
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )
    return _show(report)


def _show(report: Report) -> int:
    table = Table("kill", "run", "aimed at", "after", "found", "resumed from", "state", "ok")
    for kill in report.kills:
        table.add_row(
            str(kill.number),
            str(kill.run),
            kill.moment,
            f"{kill.seconds:.2f} s",
            kill.found,
            f"step {kill.step}",
            kill.state,
            "; ".join(kill.faults) or "ok",
        )
    show(table)
    for moment in report.unseen:
        print(f"no process came by: {moment}")
    for number, faults in enumerate(report.runs, 1):
        print(f"run {number}: {'; '.join(faults) or 'the same bits, every row once'}")
    same = sum(not faults for faults in report.runs)
    bad = sum(bool(kill.faults) for kill in report.kills)
    print(
        f"{len(report.kills)} kills, {bad} with faults; {same} of {len(report.runs)} runs ended "
        f"with params_sha256 {report.params_sha256}"
    )
    return int(not report.ok)
