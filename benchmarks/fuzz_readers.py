"""Does any reader of untrusted files fail with something other than a named error?

Run: ``python benchmarks/fuzz_readers.py`` (some minutes on two cores). For each reader whole files
are spoilt (bits flipped, pieces cut, doubled or made noise, numbers at the edges of their types, deep
nesting, and changes that keep lengths and checksums right) and read, 10,000 times by default, under
a limit on memory. The table shows how many were accepted, which errors refused the others, how many
crashed, and the longest time that one took; every kind of crash is printed with the number of its
input, and is the exit status.
"""

import argparse
import collections
import logging
import resource
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

from rich import print
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "fuzz"))

from fuzz_cases import Reader, inputs, outcome, readers

GIB = 2**30


def fuzz(name: str, reader: Reader, count: int, seed: int, folder: Path) -> tuple[list[str], int]:
    """Return one row of the table, and the number of crashes."""
    counts: collections.Counter[str] = collections.Counter()
    seen = set()
    slowest = 0.0
    for number, (file, files) in enumerate(inputs(reader, seed, count)):
        start = time.perf_counter()
        kind, error = outcome(reader, file, files, folder)
        slowest = max(slowest, time.perf_counter() - start)
        counts[kind] += 1
        if kind == "crash" and error is not None:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            if (where := (type(error), frame.filename, frame.lineno)) not in seen:
                seen.add(where)
                print(f"{name}: input {number} of seed {seed}, {file}:")
                traceback.print_exception(error)
    accepted, crashes = counts.pop("accepted", 0), counts.pop("crash", 0)
    refused = ", ".join(f"{kind} {times:,}" for kind, times in counts.most_common())
    row = [name, f"{count:,}", f"{accepted:,}", refused, f"{crashes:,}", f"{slowest:.2f} s"]
    return row, crashes


def main() -> int:
    """Fuzz every reader and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="inputs for each reader")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--memory", type=int, default=4, help="GiB of new memory that may be taken")
    parser.add_argument("--only", nargs="*", help="readers; by default all")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    table = Table("reader", "inputs", "accepted", "refused", "crashes", "slowest")
    crashes = 0
    with tempfile.TemporaryDirectory() as scratch:
        cases = readers(Path(scratch) / "seeds")
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + options.memory * GIB
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for name in options.only or cases:
            row, failed = fuzz(name, cases[name], options.count, options.seed, Path(scratch) / "x")
            table.add_row(*row)
            crashes += failed
    print(table)
    return 1 if crashes else 0


if __name__ == "__main__":
    sys.exit(main())
