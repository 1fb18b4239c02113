"""A source larger than the memory that the process may have streams through the feed."""

import subprocess
import sys

import pytest

SCRIPT = """
import itertools, re, resource, sys
from pathlib import Path
import numpy as np
from fnml.data import Batches, TokenSource

def kilobytes(field):
    return int(re.search(rf"{field}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

path, count = Path(sys.argv[1]), 1 << 30
with path.open("wb") as file:
    np.lib.format.write_array_header_1_0(
        file, {"descr": "<u2", "fortran_order": False, "shape": (count,)}
    )
    header = file.tell()
    file.truncate(header + 2 * count)
    file.seek(header + 2 * (count - 10))
    file.write(np.full(10, 7, "<u2").tobytes())

# From here on, 128 MiB of private memory for 2 GiB of tokens.
limit = kilobytes("VmData") * 1024 + (128 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    np.ones(256 << 20, np.uint8)
except MemoryError:
    print("limited")

before = kilobytes("RssAnon")
source = TokenSource(path, window=256)
batches = Batches(source, 64, seed=1)
seen = np.zeros(len(source), bool)
steps = 2000
with batches.feed([None] * steps) as feed:
    for number, batch in enumerate(feed):
        seen[batches.indices(np.arange(number * 64, number * 64 + 64))] = True
        assert batch["tokens"].shape == (64, 256)
assert seen.sum() == 64 * steps
print(len(source), len(source.fingerprint), int(batches.state(steps)["position"]))
print("grew", (kilobytes("RssAnon") - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_gigabytes_stream_in_a_fraction_of_the_memory(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "tokens.npy")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    limited, counts, grew = done.stdout.splitlines()
    assert limited == "limited"
    assert counts == f"{((1 << 30) - 257) // 256 + 1} 32 128000"
    # 4 MB of `seen`, a few megabytes of prefetched batches, allocator slack.
    assert int(grew.split()[1]) < 64
