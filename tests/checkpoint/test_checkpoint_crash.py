"""SIGKILL a process at many instants of a save: a whole step always survives."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fnml.checkpoint import Checkpointer, restore, verify

WORKER = Path(__file__).with_name("crash_worker.py")
STEPS = [3, 4, 4, 5]  # what the worker saves, in order, over the steps 1 and 2


def state_of(step):
    return {f"w{i}": np.full(2**15, step * 10 + i, np.float32) for i in range(4)}


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    directory = tmp_path_factory.mktemp("crash") / "template"
    with Checkpointer(directory) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state_of(step), {"take": -1})
    return directory


def run(root, template, jobs):
    done = subprocess.run(
        [sys.executable, str(WORKER), str(root), str(template), json.dumps(jobs)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(directory, acknowledged):
    """What survives is whole, no older than what was acknowledged, and can be built upon."""
    said = []
    step, state, meta = restore(directory, state_of(0), on_skip=said.append)
    assert said == [], "a torn step was visible"
    for name, want in state_of(step).items():
        np.testing.assert_array_equal(state[name], want)
    take = meta["take"]
    assert step == (STEPS[take] if take >= 0 else 2)
    assert take >= max(acknowledged, default=-1), "an acknowledged step is gone"

    with Checkpointer(directory, keep_last=2, keep_best=0) as checkpointer:
        assert not [p.name for p in directory.iterdir() if p.name.startswith(".")]
        assert checkpointer.latest() == step
        again = restore(directory, state_of(0), on_skip=said.append)
        assert (again.step, again.meta, said) == (step, meta, [])
        checkpointer.save(6, state_of(6), {"take": 9})
    assert restore(directory, state_of(0), step=6).meta == {"take": 9}
    assert not any(verify(directory).values())
    return step, take


def test_killed_at_any_file_operation_a_whole_step_survives(tmp_path, template):
    control = run(tmp_path, template, {"control": {}})
    assert control == {"control": [False, [0, 1, 2, 3]]}
    events = json.loads((tmp_path / "events.json").read_text())
    renames = events.count("os.rename")
    # Orbax renames once per save and we do; three deletions, one step set aside and deleted.
    assert renames >= 4 + 4 + 3 + 2

    # Just before and just after every rename, and evenly between all operations; their number
    # varies a little, so the last tenth is left to the renames.
    jobs = {
        f"rename-{nth}-{after}": {"kind": "os.rename", "nth": nth, "after": after}
        for nth in range(1, renames + 1)
        for after in (0, 1)
    }
    for nth in range(1, int(0.9 * len(events)), len(events) // 6):
        jobs[f"any-{nth}"] = {"nth": nth}
    survivors = set()
    for name, (killed, acknowledged) in run(tmp_path, template, jobs).items():
        assert killed, name
        survivors.add(check(tmp_path / name, acknowledged))
    # The instants were early and late ones, and of both takes of step 4.
    assert survivors == {(2, -1), (3, 0), (4, 1), (4, 2), (5, 3)}


def test_killed_at_any_time_a_whole_step_survives(tmp_path, template):
    """What Orbax's own threads write is not seen by an audit hook: kill by the clock as well."""
    rng = np.random.default_rng(0)
    jobs = {f"t{i}": {"delay": float(rng.uniform(0.01, 0.6))} for i in range(8)}
    outcomes = run(tmp_path, template, jobs)
    assert any(killed for killed, _ in outcomes.values())
    for name, (_, acknowledged) in outcomes.items():
        check(tmp_path / name, acknowledged)
