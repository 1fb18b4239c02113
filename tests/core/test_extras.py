"""Optional packages: missing is one thing, broken another."""

import sys

import pytest

from fnml.core import MissingExtraError, require


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return a function that makes an importable package of the given files."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def make(**files):
        (tmp_path / "sample_extra").mkdir()
        for name, text in files.items():
            (tmp_path / "sample_extra" / f"{name}.py").write_text(text)

    yield make
    for name in set(sys.modules) - before:
        if name.split(".")[0] == "sample_extra":
            del sys.modules[name]


def test_a_package_that_is_there_is_returned(package):
    package(__init__="", part="answer = 42")
    assert require("sample_extra.part", extra="sample").answer == 42


@pytest.mark.parametrize("module", ["sample_extra", "sample_extra.part"])
def test_a_missing_package_names_the_extra(module):
    with pytest.raises(MissingExtraError) as error:
        require(module, extra="sample")
    assert "the package 'sample_extra', which is not installed" in str(error.value)
    assert "pip install 'fnml[sample]'" in str(error.value)
    assert isinstance(error.value, ImportError)
    assert isinstance(error.value.__cause__, ModuleNotFoundError)


def test_a_package_whose_own_dependency_is_missing_is_not_called_missing(package):
    package(__init__="import absent_dependency")
    with pytest.raises(ModuleNotFoundError, match="absent_dependency") as error:
        require("sample_extra", extra="sample")
    assert not isinstance(error.value, MissingExtraError)


@pytest.mark.parametrize(
    ("text", "kind"), [("1 / 0", ZeroDivisionError), ("from sample_extra import x", ImportError)]
)
def test_a_package_that_is_broken_shows_its_own_error(package, text, kind):
    package(__init__=text)
    with pytest.raises(kind) as error:
        require("sample_extra", extra="sample")
    assert not isinstance(error.value, MissingExtraError)


def test_a_package_that_lost_one_of_its_files_is_not_called_missing(package):
    package(__init__="import sample_extra.lost")
    with pytest.raises(ModuleNotFoundError, match=r"sample_extra\.lost"):
        require("sample_extra", extra="sample")
