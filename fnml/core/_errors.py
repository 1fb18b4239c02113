"""The errors that fnml raises, and the sentence they are made of.

Every message says what was got, what was expected, where, and what to do.
"""

import difflib
from collections.abc import Iterable


class FnmlError(Exception):
    """Base class of every error that fnml raises on purpose."""


class ConfigError(FnmlError, ValueError):
    """A configuration value is wrong, or two of them do not fit together.

    Cause: a field is out of range, unknown, or contradicts another field.
    Cure: the message names the field and the values it takes.
    """


class ShapeError(FnmlError, ValueError):
    """An array or a tree has another shape, dtype or structure than expected.

    Cause: a batch, parameter or state does not match its description.
    Cure: the message lists every mismatch by path.
    """


class DataError(FnmlError, ValueError):
    """A data source is missing, empty, too short, damaged, or not the one expected.

    Cause and cure are in the message, with the path or the record's index.
    """


class CheckpointError(FnmlError, RuntimeError):
    """A checkpoint is missing, damaged, or belongs to another run.

    Cause: a file is absent or fails its checksum, or its tree is not the one asked for.
    Cure: the message names the file or path; older verified steps are left untouched.
    """


class RunError(FnmlError, RuntimeError):
    """A run directory cannot be used for what was asked.

    Cause: it holds another run, a finished run, or no run at all.
    Cure: the message names the directory and the command that fits.
    """


class NonFiniteError(FnmlError, ArithmeticError):
    """The loss or a parameter became NaN or infinite.

    Cause: usually a learning rate too high, or a division by zero in the loss.
    Cure: the message names the step; the last good checkpoint is kept.
    """


class LayoutError(FnmlError, ValueError):
    """A batch cannot be divided, or transforms be stacked, in the way asked for.

    Cause: a batch axis that the number of shards does not divide, or a refused order.
    Cure: the message names the numbers, or the rule and the order that works.
    """


class MissingExtraError(FnmlError, ImportError):
    """A feature needs an optional package that is not installed.

    Cure: the message gives the ``pip install`` command.
    """


def nearest(name: str, options: Iterable[str]) -> str:
    """Return `` Did you mean ...?`` for the options close to ``name``, else ``""``.

    >>> nearest("digist", ["digits", "lm"])
    " Did you mean 'digits'?"
    >>> nearest("zebra", ["digits", "lm"])
    ''
    """
    close = difflib.get_close_matches(name, sorted(set(options)), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
