"""Show what was found about a loss."""

import math
from collections.abc import Sequence

from rich.table import Table

from fnml.cli._show import show
from fnml.laws import Finding


def report(findings: Sequence[Finding], subject: str) -> int:
    """Print a table of findings; return 1 if one is broken."""
    table = Table(subject, "", "difference", "bound", "in practice")
    for finding in findings:
        table.add_row(
            finding.law,
            finding.status,
            _number(finding.difference),
            _number(finding.bound),
            finding.meaning,
        )
    show(table)
    broken = [finding.law for finding in findings if finding.status == "broken"]
    if broken:
        print(f"{len(broken)} of {len(findings)} broken: {', '.join(broken)}")
    return int(bool(broken))


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return "0" if value == 0 else f"{value:.1e}" if math.isfinite(value) else str(value)
