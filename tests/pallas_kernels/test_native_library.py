"""The library of C++ bodies: how it is built, found and refused; and that it keeps to its memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from native_builds import EMULATED, NATIVE, build

from fnml.core import ConfigError
from fnml.pallas_kernels import build_native, native_faults, native_kernels
from fnml.pallas_kernels.native import _library, active

ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(bool(native_faults()), reason="; ".join(native_faults()))


@needs_compiler
def test_it_is_built_once_and_kept_apart_by_what_it_is_made_of(tmp_path, monkeypatch):
    sources = tmp_path / "cc"
    sources.mkdir()
    (sources / "one.cc").write_text('extern "C" int one() { return 1; }\n')
    monkeypatch.setattr(_library, "SOURCES", sources)
    first = build_native(tmp_path)
    stamp = first.stat().st_mtime_ns
    assert build_native(tmp_path) == first and first.stat().st_mtime_ns == stamp
    (sources / "one.cc").write_text('extern "C" int one() { return 2; }\n')
    second = build_native(tmp_path)
    assert second != first and first.exists()
    assert _library.load(first).one() == 1 and _library.load(second).one() == 2
    assert first.parent.stat().st_mode & 0o777 == 0o700


@needs_compiler
def test_a_failing_compiler_is_told_and_nothing_is_left(tmp_path, monkeypatch):
    sources = tmp_path / "cc"
    sources.mkdir()
    (sources / "bad.cc").write_text("this is no C++\n")
    monkeypatch.setattr(_library, "SOURCES", sources)
    with pytest.raises(ConfigError, match=r"bad\.cc:1"):
        build_native(tmp_path)
    assert not list((tmp_path / "native").rglob("*.so*"))


def test_without_a_compiler_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="CXX=no-such-compiler"):
        build_native(tmp_path)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="apt-get install"), native_kernels():
        pass
    assert not active()


@needs_compiler
def test_a_folder_that_is_off_is_refused_unless_another_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("FNML_CACHE_DIR", "off")
    with pytest.raises(ConfigError, match="FNML_CACHE_DIR"):
        build_native()


def _exercise(library, what, **environment):
    return subprocess.run(
        [sys.executable, Path(__file__).parent / "exercise_native.py", library, what],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_ENABLE_X64": "0"} | environment,
    )


@needs_compiler
def test_with_shorter_vectors_it_compiles_without_a_warning_and_gives_the_same(tmp_path):
    if os.uname().machine != "x86_64":
        pytest.skip("these are options for x86-64")
    # Vectors of 4 are compiled only.
    build(tmp_path, "-Werror", "-fsyntax-only", "-march=x86-64")
    done = _exercise(build(tmp_path, "-Werror", "-mavx2", "-mfma"), "compare")
    assert done.returncode == 0 and "done" in done.stdout, done.stderr[-3000:]


@needs_compiler
def test_no_body_leaves_its_memory(tmp_path):
    name = [_library.compiler(), "-print-file-name=libasan.so"]
    runtime = subprocess.run(name, capture_output=True, text=True, check=False).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("the compiler's AddressSanitizer is not there")
    library = build(tmp_path, *NATIVE, "-g", "-fsanitize=address", EMULATED)
    environment = {"LD_PRELOAD": f"{runtime}:libstdc++.so.6", "ASAN_OPTIONS": "detect_leaks=0"}
    done = _exercise(library, "run", **environment)
    assert done.returncode == 0 and "done" in done.stdout, done.stderr[-3000:]
    planted = _exercise(library, "plant", **environment)
    assert planted.returncode and "AddressSanitizer: heap-buffer-overflow" in planted.stderr
    assert "attention.cc" in planted.stderr
