"""Save steps in forked processes that are killed at chosen instants; see test_checkpoint_crash.

The state is NumPy's, so that this process imports everything but starts no device and no thread
before it forks: each killed process then costs a fork, not a start of Python.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint  # noqa: F401 - imported once, before the forks

from fnml.checkpoint import Checkpointer

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def state_of(step):
    return {f"w{i}": np.full(2**15, step * 10 + i, np.float32) for i in range(4)}


def save_all(directory, acknowledged):
    """Save 3 and 4, deleting 1 and 2; save 4 again, replacing it; save 5."""
    with Checkpointer(directory, keep_last=2, keep_best=0) as checkpointer:
        for take, step in enumerate([3, 4, 4, 5]):
            checkpointer.save(step, state_of(step), {"take": take})
            checkpointer.wait()
            os.write(acknowledged, bytes([take]))


def run(directory, *, kind="", nth=0, after=0, delay=None):
    """Fork and save; kill ``after`` file operations past the ``nth`` of a kind, or at ``delay``."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        seen, countdown = [], [None]

        def hook(event, args):
            if event not in EVENTS or str(directory) not in str(args[:2]):
                return
            seen.append(event)
            if countdown[0] is None and event.startswith(kind) and nth:
                if sum(e.startswith(kind) for e in seen) == nth:
                    countdown[0] = after
            elif countdown[0]:
                countdown[0] -= 1
            if countdown[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        status = 1
        try:
            save_all(directory, write)
            (directory.parent / "events.json").write_text(json.dumps(seen))
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with os.fdopen(read, "rb") as pipe:
        return os.WIFSIGNALED(status), list(pipe.read())


if __name__ == "__main__":
    root, template = Path(sys.argv[1]), Path(sys.argv[2])
    outcomes = {}
    for name, job in json.loads(sys.argv[3]).items():
        shutil.copytree(template, root / name)
        outcomes[name] = run(root / name, **job)
    print(json.dumps(outcomes))
