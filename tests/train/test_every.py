"""When something is due."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fnml.core import ConfigError
from fnml.train import Every


@given(steps=st.integers(1, 50), step=st.integers(0, 500))
def test_the_next_step_is_the_first_one_that_is_due(steps, step):
    every = Every(steps=steps)
    ahead = step + 1
    while not every.due(ahead, 0.0):
        ahead += 1
    assert every.next_step(step) == ahead
    assert ahead % steps == 0


def test_minutes_count_from_the_last_time():
    every = Every(minutes=2)
    assert every.next_step(7) is None
    assert not every.due(7, 119.9)
    assert every.due(7, 120.0)


def test_either_makes_it_due():
    every = Every(steps=10, minutes=1)
    assert every.next_step(10) == 20
    assert every.due(10, 0.0) and every.due(11, 60.0) and not every.due(11, 59.0)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({}, "needs steps"),
        ({"steps": 0}, "got 0"),
        ({"minutes": 0.0}, "got 0.0"),
        ({"minutes": -1.0}, "got -1.0"),
        ({"minutes": float("nan")}, "got nan"),
    ],
)
def test_what_is_never_due_is_refused(arguments, word):
    with pytest.raises(ConfigError, match=word):
        Every(**arguments)
