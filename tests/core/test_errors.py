"""The error classes: each is an FnmlError and the built-in kind that callers expect."""

import pytest

from fnml import core

KINDS = {
    core.ConfigError: ValueError,
    core.ShapeError: ValueError,
    core.DataError: ValueError,
    core.CheckpointError: RuntimeError,
    core.RunError: RuntimeError,
    core.NonFiniteError: ArithmeticError,
    core.LayoutError: ValueError,
    core.MissingExtraError: ImportError,
}


@pytest.mark.parametrize("error", KINDS)
def test_each_is_ours_and_a_built_in_and_says_what_to_do(error):
    assert issubclass(error, core.FnmlError)
    assert issubclass(error, KINDS[error])
    assert "Cause" in error.__doc__ or "Cure" in error.__doc__


def test_no_error_class_is_left_out():
    ours = {
        value
        for value in vars(core).values()
        if isinstance(value, type) and issubclass(value, core.FnmlError)
    }
    assert ours == {*KINDS, core.FnmlError}


def test_nearest_names_every_close_option():
    assert core.nearest("kernal", ["kernel", "colonel", "bias"]).startswith(
        " Did you mean 'kernel'"
    )
    both = core.nearest("abc1", ["abc2", "abc3"])
    assert both in (" Did you mean 'abc2' or 'abc3'?", " Did you mean 'abc3' or 'abc2'?")
    assert core.nearest("zebra", ["kernel"]) == ""
    assert core.nearest("x", []) == ""
