"""Start launchers, hurt what they have started, and read what came of it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

TINY = [
    *["digits", "--network", "mlp", "--mlp.hidden", "16", "--batch-size", "32", "--accumulate"],
    *["4", "--devices", "2", "--fuse", "4", "--log-every", "20", "--eval-every", "200"],
    *["--save-every", "40", "--steps", "400", "--warmup", "2", "--quiet"],
]


def words(*arguments):
    return [sys.executable, "-m", "fnml", "launch", *map(str, arguments)]


@contextlib.contextmanager
def launcher(*arguments, popen=subprocess.Popen, **options):
    """Start ``fnml launch``; neither it nor its processes outlive the block."""
    process = popen(
        words(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ranks(launcher):
    """Return the process ids of a launcher's processes, by their number."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):
            if path.read_text().rpartition(")")[2].split()[1] == str(launcher.pid):
                text = path.with_name("environ").read_text()
                variables = dict(line.split("=", 1) for line in text.split("\0") if "=" in line)
                if "FNML_PROCESS_ID" in variables:
                    found[int(variables["FNML_PROCESS_ID"])] = int(path.parent.name)
    return found


def hurt(launcher, rank, number=signal.SIGKILL):
    os.kill(ranks(launcher)[rank], number)


def newest_step(directory):
    names = [path.name for path in (Path(directory) / "checkpoints").glob("[0-9]*")]
    return max(map(int, names), default=0)


def wait_until(happened, launcher, seconds=200):
    """Wait until something has happened; return when, by the clock of the supervisor's log."""
    end = time.monotonic() + seconds
    while not happened():
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
    return time.time()


def story(directory):
    """Return the events of a run's supervisor, as ``(seconds since the epoch, event, text)``."""
    from datetime import datetime

    lines = (Path(directory) / "supervisor.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return [(datetime.fromisoformat(e["time"]).timestamp(), e["event"], e["text"]) for e in events]


def result(directory):
    return json.loads((Path(directory) / "result.json").read_text())


def outcome(directory):
    """Return what has to be the same, however a run came to its end."""
    found = result(directory)
    return found["params_sha256"], found["step"], found["train"], found["eval"]


def rows(directory):
    """Return the rows of a run without their timing."""
    lines = (Path(directory) / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name != "timing"}
        for line in lines
    ]
