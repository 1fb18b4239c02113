"""Text to train on: the split shares no file, and whatever cannot be used is named."""

import sysconfig
from pathlib import Path

import pytest

from fnml.core import ConfigError, DataError
from fnml.models import GPTConfig
from fnml.recipes import find_recipe
from fnml.recipes._corpus import read_files, standard_library
from fnml.recipes._lm import LmConfig


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A library of our own, with all that has to be left out."""
    root = tmp_path / "lib"
    for i in range(45):
        path = root / ("package" if i % 2 else "") / f"module{i:02d}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# module {i:02d}\n")
    for skipped in ("test", "x/tests", "idlelib/idle_test", "site-packages/y", "__pycache__"):
        path = root / skipped / "never.py"
        path.parent.mkdir(parents=True)
        path.write_text("# never\n")
    (root / "data.txt").write_text("never")
    (root / "directory.py").mkdir()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    return root


def test_the_library_is_split_by_files_in_the_order_of_their_paths(library):
    names = sorted(
        (path.relative_to(library) for path in library.rglob("module*.py")), key=lambda p: p.parts
    )
    texts = [(library / name).read_bytes() for name in names]
    corpus = standard_library()
    held_out = [texts[19], texts[39]]
    assert corpus.held_out == b"\n".join(held_out)
    assert corpus.train == b"\n".join(text for text in texts if text not in held_out)
    assert b"never" not in corpus.train + corpus.held_out
    assert standard_library() == corpus


def test_a_python_without_its_source_is_named(library):
    for path in library.rglob("module1*.py"):
        path.unlink()
    for path in library.rglob("module[234]*.py"):
        path.unlink()
    with pytest.raises(DataError, match=r"has 10 source files.*--text FILE"):
        standard_library()


def test_this_pythons_own_library():
    corpus = standard_library()
    root = Path(sysconfig.get_paths()["stdlib"])
    known = (root / "dataclasses.py").read_bytes()
    assert (known in corpus.train) != (known in corpus.held_out)
    share = len(corpus.held_out) / (len(corpus.train) + len(corpus.held_out))
    assert 0.02 < share < 0.12
    assert len(corpus.train) > 5_000_000


def test_few_files_hold_out_their_last_twentieth(tmp_path):
    (tmp_path / "a").write_bytes(b"a" * 500)
    (tmp_path / "b").write_bytes(b"b" * 499)
    corpus = read_files([str(tmp_path / "a"), str(tmp_path / "b")])
    assert corpus.train + corpus.held_out == b"a" * 500 + b"\n" + b"b" * 499
    assert corpus.held_out == b"b" * 50


def test_twenty_files_hold_out_whole_files(tmp_path):
    paths = []
    for i in range(41):
        paths.append(str(tmp_path / f"f{i}"))
        Path(paths[-1]).write_bytes(b"%02d" % i)
    corpus = read_files(paths)
    assert corpus.held_out.split(b"\n") == [b"19", b"39"]
    expected = [b"%02d" % i for i in range(41) if i not in (19, 39)]
    assert corpus.train.split(b"\n") == expected
    nineteen = read_files(paths[:19])
    assert nineteen.train + nineteen.held_out == b"\n".join(b"%02d" % i for i in range(19))


def test_every_unusable_file_is_listed(tmp_path):
    (tmp_path / "fine").write_text("text")
    (tmp_path / "empty").touch()
    (tmp_path / "blank").write_text(" \n\t\n")
    paths = [str(tmp_path / name) for name in ("fine", "gone", "empty", "blank", ".")]
    with pytest.raises(DataError) as caught:
        read_files(paths)
    message = str(caught.value)
    assert f"{paths[1]}: No such file or directory" in message
    assert f"{paths[2]}: is empty" in message
    assert f"{paths[3]}: is empty" in message
    assert f"{paths[4]}: Is a directory" in message
    assert paths[0] not in message


def config(path, **fields):
    return LmConfig(
        model=GPTConfig(width=8, layers=1, heads=1, **fields), text=(str(path),), tokens="bytes"
    )


def test_text_that_is_too_short_is_counted(tmp_path):
    path = tmp_path / "short.txt"
    path.write_bytes(b"x" * 200)
    build = find_recipe("lm").build
    with pytest.raises(DataError, match=r"training text has 190 tokens, fewer.*190 \+ 1.*context"):
        build(config(path, context=190), None)
    with pytest.raises(DataError, match=r"held-out text has 10 tokens.*10 \+ 1: use more text"):
        build(config(path, context=10), None)
    assert len(list(build(config(path, context=9), None).held_out())) == 1


def test_byte_tokens_have_one_vocabulary(tmp_path):
    with pytest.raises(ConfigError, match="vocab=257"):
        config(tmp_path, vocab=257)
