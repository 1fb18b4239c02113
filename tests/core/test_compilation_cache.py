"""Compiled programs are kept on disk: whose choice it is, for which machine, how many, and whole."""

import os
import subprocess
import sys
import zlib

import jax
import pytest

from fnml import compilation_cache
from fnml.core import _compilation_cache as module


@pytest.fixture
def nobody_chose(monkeypatch):
    """A process in which JAX was given no cache."""
    before = {
        name: getattr(jax.config, name)
        for name in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    }
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    monkeypatch.delenv("FNML_CACHE_DIR", raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_folder_is_the_argument_the_variable_or_the_users(nobody_chose, monkeypatch, tmp_path):
    def chosen(*args):
        jax.config.update("jax_compilation_cache_dir", None)
        place, _ = compilation_cache(*args)
        assert jax.config.jax_compilation_cache_dir == str(place)
        assert place.is_dir() and place.stat().st_mode & 0o777 == 0o700
        return place.parents[1]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert chosen() == tmp_path / "xdg" / "fnml"
    monkeypatch.setenv("FNML_CACHE_DIR", str(tmp_path / "variable"))
    assert chosen() == tmp_path / "variable"
    assert chosen(tmp_path / "argument") == tmp_path / "argument"
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
    monkeypatch.delenv("FNML_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # such values are to be ignored
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert chosen() == tmp_path / "home" / ".cache" / "fnml"


def test_off_and_unusable_folders_leave_jax_without_a_cache(nobody_chose, monkeypatch, tmp_path):
    monkeypatch.setenv("FNML_CACHE_DIR", "off")
    assert compilation_cache()[0] is None
    (tmp_path / "file").write_text("no folder")
    place, why = compilation_cache(tmp_path / "file")
    assert place is None and "cannot be used" in why
    assert jax.config.jax_compilation_cache_dir is None


def test_a_cache_chosen_through_jax_stays(nobody_chose, monkeypatch, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    for variable in ("off", str(tmp_path / "other")):
        monkeypatch.setenv("FNML_CACHE_DIR", variable)
        place, why = compilation_cache()
        assert place == tmp_path / "mine" and "JAX_COMPILATION_CACHE_DIR" in why
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
    assert not (tmp_path / "other").exists()


def test_other_instructions_and_numbers_of_cpus_have_other_programs(monkeypatch):
    here = module.machine()
    assert here == module.machine()
    if sys.platform == "linux":
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(999)))
        assert module.machine() == here.rsplit("-", 1)[0] + "-999cpu"
        monkeypatch.undo()
        text = "model name : x\nflags : avx2"
        monkeypatch.setattr(module.Path, "read_text", lambda self, **kw: text)
        one = module.machine()
        text = "model name : x\nflags : avx512f"
        assert one != here and module.machine() != one


def test_programs_used_longest_ago_are_removed(nobody_chose, tmp_path):
    place, _ = compilation_cache(tmp_path)
    other = place.with_name("of another machine")
    other.mkdir()
    paths = [place / "a-cache", other / "b-cache", place / "c-cache"]
    for age, path in enumerate(paths):
        path.write_bytes(zlib.compress(bytes(1000), level=0))
        os.utime(path, (age, age))
    size = paths[0].stat().st_size
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache(tmp_path, most_bytes=2 * size)
    assert [path.exists() for path in paths] == [False, True, True]
    compilation_cache(tmp_path, most_bytes=2 * size - 1)
    assert [path.exists() for path in paths] == [False, False, True]


def test_a_program_that_was_written_in_part_is_removed(nobody_chose, tmp_path):
    place, _ = compilation_cache(tmp_path)
    whole = zlib.compress(os.urandom(99))
    altered = whole[:20] + bytes([whole[20] ^ 1]) + whole[21:]
    contents = {"whole": whole, "half": whole[:30], "empty": b"", "altered": altered}
    for name, data in contents.items():
        (place / f"{name}-cache").write_bytes(data)
    compilation_cache(tmp_path)
    assert [path.name for path in place.glob("*-cache")] == ["whole-cache"]


_COUNT = """
import jax
counts = {"hits": 0, "misses": 0}
def listen(event, **kw):
    for name in counts:
        counts[name] += event == f"/jax/compilation_cache/cache_{name}"
jax.monitoring.register_event_listener(listen)
import sys
from fnml.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert end.code == 0, end.code
print(counts["hits"], counts["misses"])
"""


def test_the_second_run_of_a_recipe_compiles_nothing(tmp_path):
    command = [
        *[
            "train",
            "digits",
            "--network",
            "mlp",
            "--mlp.hidden",
            "8",
            "--steps",
            "6",
            "--fuse",
            "3",
        ],
        *["--batch-size", "8", "--log-every", "3", "--eval-every", "3", "--save-every", "6"],
    ]
    environment = {**os.environ, "FNML_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("JAX_COMPILATION_CACHE_DIR")
    environment.pop("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", None)

    def run(name):
        out = ["--quiet", "--out", str(tmp_path / name)]
        done = subprocess.run(
            [sys.executable, "-c", _COUNT, *command, *out],
            capture_output=True,
            text=True,
            env=environment,
            check=True,
        )
        *_, sha, counts = done.stdout.splitlines()
        return sha, [int(x) for x in counts.split()]

    sha, (_, misses) = run("first")
    again, (hits, none) = run("second")
    assert misses > 2 and hits == misses and none == 0
    assert sha == again


def test_the_command_line_keeps_programs_unless_told_not_to(tmp_path):
    environment = {**os.environ, "FNML_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("JAX_COMPILATION_CACHE_DIR")
    for before, there in (["--no-cache"], False), ([], True):
        line = [sys.executable, "-m", "fnml", *before, "plugins"]
        subprocess.run(line, env=environment, check=True, capture_output=True)
        assert (tmp_path / "cache").exists() == there
