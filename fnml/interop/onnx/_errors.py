"""Errors of models that cannot be brought in or out."""

from fnml.core import FnmlError


class UnsupportedError(FnmlError, NotImplementedError):
    """A model uses what cannot be imported, or a function what cannot be exported.

    Cause: an operator, type or opset (or a primitive, on the way out) that has no counterpart.
    Cure: the message lists all of them with their nodes; rewrite these, or ask for them.
    """
