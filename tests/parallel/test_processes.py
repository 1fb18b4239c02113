"""Processes agree on what to do after which step; a smaller size has the same bits; who is blamed.

Threads over one store stand for processes here; tests/parallel/test_launch.py has real ones.
"""

import threading
import time

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from fnml.core import ConfigError
from fnml.parallel import Processes
from fnml.parallel._initialize import place
from fnml.parallel._shrink import Size, shrink
from fnml.parallel._watchdog import Patience, Seen, stuck
from fnml.recipes import RunConfig


class Store:
    """What the coordinator keeps, for threads."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, key, value):
        with self.changed:
            assert key not in self.values
            self.values[key] = value
            self.changed.notify_all()

    def key_value_dir_get(self, prefix):
        with self.changed:
            return [(k, v) for k, v in self.values.items() if k.startswith(prefix)]

    def blocking_key_value_get(self, key, patience):
        with self.changed:
            assert self.changed.wait_for(lambda: key in self.values, 30)
            return self.values[key]


def together(count, body):
    """Run ``body(processes)`` in as many threads; return what they return, in order."""
    store, results = Store(), {}

    def run(index):
        results[index] = body(Processes(index, count, store))

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "the processes wait for each other forever"
    return [results[i] for i in range(count)]


@pytest.mark.parametrize("seed", range(3))
def test_they_act_after_the_same_step_though_clocks_and_signals_differ(seed):
    steps, done, changed = 60, [0, 0, 0], threading.Condition()
    wished = {(1, 17): {"due 1": ""}, (2, 31): {"stop": "SIGTERM"}, (0, 31): {"stop": "SIGINT"}}

    def body(processes):
        rng, acted, pending = np.random.default_rng([seed, processes.index]), [], {}
        for step in range(1, steps + 1):
            time.sleep(rng.uniform(0, 0.01))
            with changed:
                done[processes.index] = step
                changed.notify_all()
                if step % 7 == 0:
                    # As a loop that reads a loss: the others have to have come as far.
                    assert changed.wait_for(lambda step=step: min(done) >= step - 3, 20)
            pending |= wished.get((processes.index, step), {})
            if step == steps:
                processes.agree(step, None)
                break
            found = processes.agree(step, dict(pending))
            if found:
                acted.append((step, sorted(found)))
                pending.clear()
            if "stop" in found:
                processes.agree(step, None)
                break
        return acted

    found = together(3, body)
    assert found[0] == found[1] == found[2]
    assert [names for _, names in found[0]] == [["due 1"], ["stop"]]
    assert all(step >= least for (step, _), least in zip(found[0], (17, 31), strict=True))


def test_a_wish_at_the_end_waits_for_nobody():
    def body(processes):
        for step in range(1, 4):
            time.sleep(0.1 * processes.index)
            # The slower one has a wish when the other has no step left.
            late = processes.index == 1 and step == 3
            assert processes.agree(step, {"stop": "SIGTERM"} if late else {}) == {}
        processes.agree(4, None)
        return True

    assert together(2, body) == [True, True]


def test_what_process_0_says_reaches_all_and_it_hears_all():
    def body(processes):
        said = processes.share("step", {"step": 7} if processes.first else None)
        return said, processes.gather("hash", f"h{processes.index}")

    assert together(3, body) == [
        ({"step": 7}, ["h0", "h1", "h2"]),
        ({"step": 7}, None),
        ({"step": 7}, None),
    ]


@settings(max_examples=200)
@given(
    processes=st.integers(1, 6),
    each=st.integers(1, 4),
    per_device=st.sampled_from([1, 2, 4, 8]),
    available=st.integers(0, 6),
    least=st.integers(1, 3),
)
def test_a_smaller_size_is_the_largest_with_the_same_bits(
    processes, each, per_device, available, least
):
    devices = processes * each
    shards = devices * per_device
    found = shrink(Size(processes, devices), shards, available, least)

    def fits(size):
        try:
            RunConfig(batch_size=shards, accumulate=shards, devices=size.devices)
        except ConfigError:
            return False
        return size.devices % size.processes == 0

    everything = [
        size
        for p in range(least, min(processes, available) + 1)
        for d in range(p, p * each + 1)
        if fits(size := Size(p, d))
    ]
    assert found == max(everything, default=None)


PATIENCE = Patience(start=300, first=100, step=10)


def seen(index, arrived=2, step=5, idle=0.0, frozen=False, code=None):
    return Seen(index, arrived, step, idle, frozen, code)


@pytest.mark.parametrize(
    ("processes", "expected"),
    [
        ([seen(0, idle=9), seen(1, idle=9)], None),
        ([seen(0, idle=11), seen(1, step=4, idle=11)], "process 1 has shown no sign"),
        ([seen(0, idle=11, frozen=True), seen(1, step=4, idle=11)], "process 0 has shown no sign"),
        # Who waits for a stopped one may be silent for longer than it.
        ([seen(0, idle=11), seen(1, idle=9, frozen=True)], None),
        # Who has done its first step waits for who has not, as long as that may take.
        ([seen(0, step=0, idle=90), seen(1, step=-1, idle=80)], None),
        ([seen(0, step=0, idle=101), seen(1, step=-1, idle=99)], "process 1.* before its first"),
        ([seen(0, arrived=1, idle=290), seen(1, arrived=0, idle=200)], None),
        ([seen(0, arrived=1, idle=301), seen(1, arrived=0)], r"process 1 has not .*arrived: 0\)"),
        ([seen(0, arrived=1, idle=301), seen(1, arrived=1)], "did not get through"),
        ([seen(0, idle=99, code=0), seen(1, idle=9)], None),
    ],
)
def test_the_watchdog_blames_the_one_that_the_others_wait_for(processes, expected):
    found = stuck(processes, PATIENCE, "node1:8476")
    assert (found is None) == (expected is None)
    if expected is not None:
        import re

        assert re.search(expected, found)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"FNML_PROCESS_COUNT": "2"}, "FNML_PROCESS_ID is None: expected a number"),
        ({"FNML_PROCESS_COUNT": "x", "FNML_PROCESS_ID": "0"}, "FNML_PROCESS_COUNT is 'x'"),
        (
            {"FNML_PROCESS_COUNT": "2", "FNML_PROCESS_ID": "2", "FNML_COORDINATOR_ADDRESS": "a:1"},
            "FNML_PROCESS_ID=2, FNML_PROCESS_COUNT=2",
        ),
        ({"FNML_PROCESS_COUNT": "2", "FNML_PROCESS_ID": "1"}, "expected a process below the count"),
    ],
)
def test_half_a_place_is_refused(variables, message):
    with pytest.raises(ConfigError, match=message):
        place(variables)
