"""Keeping memory: where it has an effect, and where none."""

import resource
import subprocess
import sys

import jax
import pytest

from fnml import keep_memory
from fnml.core import ConfigError, can_keep_memory, peak_memory
from fnml.core import _memory as module

_FAULTS = """
import sys, resource, numpy as np
import fnml
print(fnml.keep_memory() if sys.argv[1] == "keep" else None)
np.ones(1 << 22)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.ones(1 << 22)  # 32 MiB, 8192 pages
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(word):
    run = subprocess.run(
        [sys.executable, "-c", _FAULTS, word], capture_output=True, text=True, check=True
    )
    taken, count = run.stdout.split()
    return taken, int(count)


@pytest.mark.skipif(can_keep_memory() is not None, reason="needs glibc and a CPU-only JAX")
def test_large_blocks_are_used_again_instead_of_being_cleared_page_by_page():
    _, plain = faults("plain")
    taken, kept = faults("keep")
    assert taken == "True" and kept < plain / 10


def test_elsewhere_it_does_nothing_and_says_so(monkeypatch):
    called = []
    monkeypatch.setattr(module, "_mallopt", lambda: lambda *args: called.append(args) or 1)
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
