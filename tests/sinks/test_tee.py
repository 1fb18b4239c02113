"""tee: a failing sink must neither end the run nor lose rows of the others."""

import logging

import pytest

from fnml.core import Row
from fnml.sinks import tee


class Recorder:
    """A sink that raises ``errors`` in turn before it works again."""

    def __init__(self, name="recorder", errors=()):
        self.name, self.errors = name, list(errors)
        self.steps, self.flushes, self.closes = [], 0, 0

    def __repr__(self):
        return self.name

    def fail(self):
        if self.errors:
            raise self.errors.pop(0)

    def write(self, row):
        self.fail()
        self.steps.append(row.step)

    def flush(self):
        self.fail()
        self.flushes += 1

    def close(self):
        self.closes += 1
        self.fail()


def row(step):
    return Row(step, "train", {"loss": 1.0})


def test_every_sink_gets_everything():
    a, b = Recorder(), Recorder()
    both = tee([a, b])
    for step in range(3):
        both.write(row(step))
    both.flush()
    both.close()
    assert (a.steps, a.flushes, a.closes) == (b.steps, b.flushes, b.closes) == ([0, 1, 2], 1, 1)


def test_a_sink_that_fails_for_a_while_loses_nothing_and_is_named_once(caplog):
    sick, well = Recorder("sick", [OSError("disk full")] * 5), Recorder("well")
    both = tee([sick, well])
    with caplog.at_level(logging.INFO, logger="fnml"):
        for step in range(4):
            both.write(row(step))
        both.flush()
        assert (sick.steps, sick.flushes) == ([], 0)
        assert (well.steps, well.flushes) == ([0, 1, 2, 3], 1)
        both.write(row(4))
    assert sick.steps == well.steps == [0, 1, 2, 3, 4]
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "sick" in warnings[0]
    assert "disk full" in warnings[0]
    assert "sick works again" in caplog.text


def test_a_flush_also_delivers_what_waited():
    sick = Recorder("sick", [OSError()])
    both = tee([sick])
    both.write(row(0))
    both.flush()
    assert (sick.steps, sick.flushes) == ([0], 1)


def test_rows_that_were_never_taken_are_reported(caplog):
    sick = Recorder("sick", [OSError("gone")] * 4)
    both = tee([sick])
    for step in range(3):
        both.write(row(step))
    both.close()
    assert sick.closes == 1
    assert repr(both) == "tee([sick])"
    assert "never took its last 3 rows" in caplog.text


def test_a_fault_of_the_program_propagates_and_still_everything_is_closed():
    broken, other = Recorder("broken", [KeyError("bug"), KeyError("again")]), Recorder("other")
    both = tee([broken, other])
    with pytest.raises(KeyError, match="bug"):
        both.write(row(0))
    with pytest.raises(KeyError, match="again"):
        both.close()
    assert broken.closes == other.closes == 1
