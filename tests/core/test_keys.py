"""Keys from names, steps and shards: the same in every process, different from each other."""

import subprocess
import sys
import zlib

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fnml.core import fold_name, shard_key, step_key


def data(key):
    return tuple(jax.random.key_data(key).tolist())


def test_names_give_the_same_key_in_another_process_with_other_string_hashes():
    names = ["", "kernel", "layers/attention/query", "größe"]
    code = (
        "import sys, jax; from fnml.core import fold_name\n"
        "for name in sys.argv[1:]:\n"
        "    print(*jax.random.key_data(fold_name(jax.random.key(7), name)).tolist())"
    )
    found = [
        subprocess.run(
            [sys.executable, "-X", "utf8", "-R", "-c", code, *names],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(2)
    ]
    assert found[0] == found[1]
    here = [data(fold_name(jax.random.key(7), name)) for name in names]
    assert [tuple(map(int, line.split())) for line in found[0].splitlines()] == here


def test_the_key_of_a_name_never_changes_between_versions():
    # A released value: a change here would change every model's initial parameters.
    assert data(fold_name(jax.random.key(0), "kernel")) == (3520189540, 3212112751)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.text(max_size=8), min_size=2, max_size=6, unique_by=lambda n: zlib.crc32(n.encode())
    )
)
def test_different_names_give_different_keys(names):
    key = jax.random.key(0)
    assert len({data(fold_name(key, name)) for name in names}) == len(names)


def test_steps_and_shards_differ_and_may_be_traced():
    key = jax.random.key(0)
    keys = [step_key(key, step) for step in range(100)]
    assert len({data(k) for k in keys}) == 100
    assert len({data(shard_key(keys[0], shard)) for shard in range(64)}) == 64
    for derive in (step_key, shard_key):
        traced = jax.jit(derive)(key, np.int32(5))
        assert data(traced) == data(derive(key, 5))
        batched = jax.vmap(derive, (None, 0))(key, np.arange(4, dtype=np.int32))
        assert [data(k) for k in batched] == [data(derive(key, i)) for i in range(4)]
