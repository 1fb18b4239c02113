"""Signals become a clean stop, and leave no trace."""

import os
import signal
import threading
import time

import pytest

from fnml.train import stop_on_signals


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # lets the interpreter run the handler


@pytest.fixture(autouse=True)
def handlers_are_put_back():
    """Give each test handlers of its own, and see that they are there again at the end."""
    marks = {number: lambda *_: None for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: signal.signal(number, mark) for number, mark in marks.items()}
    yield
    found = {number: signal.getsignal(number) for number in marks}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert found == marks


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_the_first_signal_is_named_and_nothing_is_raised(name):
    with stop_on_signals() as stopped:
        assert stopped() is None
        send(getattr(signal, name))
        assert stopped() == name


def test_the_first_of_two_signals_is_the_reason():
    with stop_on_signals() as stopped:
        send(signal.SIGINT)
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert stopped() == "SIGINT"


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_ctrl_c_after_a_signal_interrupts_at_once(first):
    with pytest.raises(KeyboardInterrupt), stop_on_signals():
        send(first)
        send(signal.SIGINT)
        pytest.fail("nothing was interrupted")


def test_an_error_inside_passes_through():
    with pytest.raises(ZeroDivisionError), stop_on_signals():
        raise ZeroDivisionError


def test_outside_the_main_thread_nothing_is_caught():
    answers = []

    def work():
        before = signal.getsignal(signal.SIGTERM)
        with stop_on_signals() as stopped:
            answers.extend([stopped(), signal.getsignal(signal.SIGTERM) is before])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers == [None, True]
