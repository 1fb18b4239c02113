"""Show a table."""

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


def show(table: Table) -> None:
    """Print a table; in a pipe or a file it is as wide as it needs, so that nothing is cut.

    Cells are shown as they are: a directory's name in brackets is no markup.
    """
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        most = console.options.update(max_width=10_000)
        console.width = max(console.width, Measurement.get(console, most, table).maximum)
    # Not straight to the output: rich has an exit of its own for a reader that went away.
    with console.capture() as text:
        console.print(table)
    print(text.get(), end="")
