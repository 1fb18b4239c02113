"""What a launcher says of a line that has ended, over real sockets."""

import socket
import time

import pytest

from fnml.parallel._link import Link


@pytest.fixture
def ends():
    """A launcher's link, and the bare socket at its other end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        far = socket.create_connection(server.getsockname())
        near, _ = server.accept()
    link = Link(near, silence=60)
    yield link, far
    link.close()
    far.close()


def reason(link):
    end = time.monotonic() + 30
    while link.lost is None and time.monotonic() < end:
        time.sleep(0.005)
    return link.lost


def test_a_launcher_that_ended_between_two_words(ends):
    link, far = ends
    far.close()
    assert reason(link) == "its launcher has ended"


def test_a_launcher_that_ended_with_words_unread(ends):
    """The system then resets the connection instead of ending it."""
    link, far = ends
    link.send({"unread": True})
    assert far.recv(1, socket.MSG_PEEK)  # it has come
    far.close()
    assert reason(link) == "its launcher has ended"


def test_a_line_that_broke_while_it_was_written_to(ends):
    link, far = ends
    far.close()
    end = time.monotonic() + 30
    while link.lost is None and time.monotonic() < end:
        link.send()
    assert link.lost == "its launcher has ended"


def test_words_of_another_program_break_the_line(ends):
    link, far = ends
    far.sendall(b"GET / HTTP/1.1\r\n")
    assert reason(link).startswith("the connection broke (Expecting value")
