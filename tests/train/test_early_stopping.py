"""Early stopping decides from the evaluations alone."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fnml.core import ConfigError, Row
from fnml.train import Progress, early_stopping


def progress(values, metric="loss"):
    rows = tuple(Row(10 * (i + 1), "eval", {metric: v}) for i, v in enumerate(values))
    return Progress(10 * len(rows), None, None, rows)  # type: ignore[arg-type]


def first_stop(callback, values, metric="loss"):
    """Return after how many evaluations the callback stops the run."""
    for i in range(len(values) + 1):
        if callback(progress(values[:i], metric)):
            return i
    return None


def textbook(values, patience, min_delta):
    best, waited = math.inf, 0
    for i, value in enumerate(values):
        if value < best - (min_delta if best < math.inf else 0):
            best, waited = value, 0
        else:
            waited += 1
        if waited >= patience:
            return i + 1
    return None


numbers = st.lists(st.sampled_from([1.0, 2.0, 2.4, 3.0, 5.0, math.nan, math.inf]), max_size=9)


@given(values=numbers, patience=st.integers(1, 3), min_delta=st.sampled_from([0.0, 0.5]))
def test_it_stops_where_the_textbook_loop_does(values, patience, min_delta):
    callback = early_stopping(patience=patience, min_delta=min_delta)
    assert first_stop(callback, values) == textbook(values, patience, min_delta)


@given(values=numbers, patience=st.integers(1, 3))
def test_max_is_min_of_the_negative(values, patience):
    up = early_stopping("accuracy", patience=patience, mode="max")
    down = early_stopping(patience=patience)
    assert first_stop(up, [-v for v in values], "accuracy") == first_stop(down, values)


def test_the_answer_depends_on_nothing_but_the_evaluations():
    values = [3.0, 2.0, 2.5, 2.1]
    used = early_stopping(patience=2)
    for _ in range(3):
        used(progress(values[:3]))
    assert used(progress(values)) == early_stopping(patience=2)(progress(values))


def test_the_reason_names_the_best_and_its_step():
    callback = early_stopping(patience=2)
    assert callback(progress([3.0, 2.0, 2.5, 2.1])) == (
        "loss is not better than 2 at step 20 in 2 evaluations"
    )
    assert "never finite in 2" in callback(progress([math.nan, math.nan]))
    rising = early_stopping("accuracy", patience=1, mode="max")(progress([0.9, 0.8], "accuracy"))
    assert rising == "accuracy is not better than 0.9 at step 10 in 1 evaluations"


def test_wrong_arguments_and_an_unknown_metric_are_named():
    with pytest.raises(ConfigError, match="patience of at least 1, got 0"):
        early_stopping(patience=0)
    with pytest.raises(ConfigError, match="'min' or 'max', got 'mim'"):
        early_stopping(mode="mim")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"watches 'acc'.*loss"):
        early_stopping("acc")(progress([1.0]))
