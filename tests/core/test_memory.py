"""Keeping memory: where it has an effect, and where none."""

import json
import os
import resource
import subprocess
import sys

import jax
import pytest

from fnml import keep_memory
from fnml.core import ConfigError, can_keep_memory, peak_memory
from fnml.core import _memory as module

_RUN = """
import ctypes, json, resource, sys
import jax, jax.numpy as jnp, numpy as np
import fnml

def held():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

taken = fnml.keep_memory() if sys.argv[1] == "keep" else None
np.ones(1 << 22)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.ones(1 << 22)  # 32 MiB, 8192 pages
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def much(x):
    for i in range(40):
        x = jnp.tanh(x @ x / (i + 1))
    return x.sum()

jax.jit(jax.grad(much)).lower(jnp.ones((64, 64))).compile()
before = held()
ctypes.CDLL(None).malloc_trim(0)
left = before - held()

x = jnp.ones(3000)  # [N, N] is 36 MB that no fusion avoids
step = jax.jit(lambda x: (x[:, None] * x) @ x * 1e-4, donate_argnums=0).lower(x).compile()
before = held()
for _ in range(50):
    x = step(x)
x.block_until_ready()
temporaries, after = step.memory_analysis().temp_size_in_bytes, held()
jax.jit(lambda x: x + 2).lower(x).compile()
found = {"steps": (after - before) / temporaries, "returned": (after - held()) / temporaries}
print(json.dumps({"taken": taken, "faults": faults, "left": left, **found}))
"""

_MOVED = """
import re, sys, time
from pathlib import Path
import numpy as np
import fnml

def held(which):
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{which}:\\s+(\\d+)", status)[1])

assert fnml.keep_memory()
KiB, block = held("VmRSS"), 128 << 20
first, behind = np.ones(block, np.int8), np.ones(4 << 20, np.int8)
del first
# Too large for where the first one was, as a step's block is by less than a hundred bytes.
second = np.empty(block + (1 << 20), np.int8)
for part in np.split(second, 129):
    part[:] = 1
    time.sleep(0.004)
print((held("VmHWM") - KiB) * 1024 / block)
"""


def run(word):
    command = [sys.executable, "-c", _RUN, word]
    # Its own compilation, or nothing would be left of one.
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return json.loads(out.stdout)


@pytest.mark.skipif(can_keep_memory() is not None, reason="needs glibc and a CPU-only JAX")
def test_blocks_are_used_again_and_only_one_step_s_are_kept():
    plain, kept = run("plain"), run("keep")
    assert kept["taken"] is True
    # Instead of being cleared page by page.
    assert kept["faults"] < plain["faults"] / 10
    # What the compiler leaves goes back.
    assert kept["left"] < plain["left"] / 4
    # Where a small program may have taken some of the step's memory, all of it goes back.
    assert kept["returned"] > 0.9
    # The temporaries of one step, though nobody waits for a step's end. On a busy machine a step
    # may begin a moment before the last one's are freed, and a process then keeps those of two
    # (one in three did, with four processes on two cores); steps at once would keep nine, always.
    runs = (kept if attempt == 0 else run("keep") for attempt in range(6))
    assert any(0.9 < found["steps"] < 1.5 for found in runs)


@pytest.mark.skipif(can_keep_memory() is not None, reason="needs glibc and a CPU-only JAX")
def test_a_block_left_for_another_place_goes_back_while_that_is_filled():
    def peak():
        return float(subprocess.check_output([sys.executable, "-c", _MOVED], text=True))

    # In blocks: two, if nobody gave back the first one. What is more than one is what the process grows by
    # before a look, 16 MiB of 128, and between two looks; a busy machine may delay these.
    assert any(1.0 < peak() < 1.5 for _ in range(3))


def test_elsewhere_it_does_nothing_and_says_so(monkeypatch):
    called = []
    monkeypatch.setattr(module, "_mallopt", lambda: lambda *args: called.append(args) or 1)
    monkeypatch.setattr(module, "_one_step_at_a_time", lambda: None)
    before = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", "cuda,cpu")
        assert keep_memory() is False and "another platform" in can_keep_memory()
        assert not called
        jax.config.update("jax_platforms", "cpu")
        assert keep_memory(arenas=3) is True and can_keep_memory() is None
        assert called[0] == (-8, 3) and len(called) == 3
    finally:
        jax.config.update("jax_platforms", before)
    monkeypatch.setattr(module, "_mallopt", lambda: None)
    assert keep_memory() is False and "glibc" in can_keep_memory()


def test_no_arena_at_all_is_refused():
    with pytest.raises(ConfigError, match="arenas=0: expected at least 1"):
        keep_memory(arenas=0)


def test_the_peak_is_that_of_the_process():
    peak = peak_memory()
    assert peak == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 or peak > 1 << 24
    grown = bytearray(64 << 20)
    assert peak_memory() >= peak and len(grown) == 64 << 20
