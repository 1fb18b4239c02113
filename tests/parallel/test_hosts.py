"""Two hosts train together; one is killed, or the cable between them pulled.

The hosts are network namespaces, each with its own name and /etc/hosts. Times are compared with the
documented ones plus SLACK, as the two cores that these tests run on are often shared with others.
"""

import time

import jax
import pytest
from launching import TINY, launcher, newest_step, outcome, rows, story, wait_until
from namespaces import two_hosts

from fnml.cli import main

HEARTBEAT, SLACK = 3, 10.0
pytestmark = pytest.mark.network_namespace


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run in one process, with the same devices."""
    jax.devices()  # all of conftest's, before the run makes as many as it needs
    directory = tmp_path_factory.mktemp("hosts") / "whole"
    with pytest.raises(SystemExit) as caught:
        main(["train", *TINY, "--out", str(directory)])
    assert caught.value.code == 0
    return directory


@pytest.fixture
def hosts(tmp_path):
    with two_hosts(tmp_path) as made:
        yield made


def start(hosts, host, run, *options, names=True):
    return launcher(
        *["--hosts", 2, "--host", host, "--coordinator", "alpha:8476", "--heartbeat", HEARTBEAT],
        *["--start-timeout", 90, "--grace", 1, *options, "--", "train", *TINY, "--out", run],
        popen=lambda words, **how: hosts.popen(host, *words, names=names, **how),
    )


def seconds_to_find(run, hurt_at):
    return next(at for at, what, _ in story(run) if what == "failed") - hurt_at


def test_a_killed_host_comes_back_and_the_run_ends_with_the_same_bits(whole, hosts, tmp_path):
    run = tmp_path / "run"
    with start(hosts, 0, run) as alpha:
        with start(hosts, 1, run) as beta:
            wait_until(lambda: newest_step(run) >= 80, alpha)
            hosts.kill(1)
            hurt_at = time.time()
            beta.wait(30)
        with start(hosts, 1, run) as beta:
            _, err = alpha.communicate(timeout=300)
            assert beta.wait(30) == 0
    assert alpha.returncode == 0, err
    assert outcome(run) == outcome(whole)
    assert rows(run) == rows(whole)
    assert seconds_to_find(run, hurt_at) < HEARTBEAT + 2 + SLACK
    assert "host 1 (beta) is lost: its launcher has ended" in err
    assert "host 1 (beta) is back" in err
    assert err.count("2 processes on host 0 (alpha), 1 (beta)") == 2


def test_a_cut_cable_is_found_by_the_heartbeat_and_one_host_goes_on(whole, hosts, tmp_path):
    run = tmp_path / "run"
    with start(hosts, 0, run, "--elastic", 1) as alpha, start(hosts, 1, run) as beta:
        wait_until(lambda: newest_step(run) >= 80, alpha)
        cut_at = time.time()
        hosts.cable("down")
        _, err = alpha.communicate(timeout=300)
        # The other side has ended its process, and only the launcher is left, which calls again.
        assert beta.poll() is None
        assert len(hosts.pids(1)) == 1
    assert alpha.returncode == 0, err
    assert outcome(run) == outcome(whole)
    assert rows(run) == rows(whole)
    assert HEARTBEAT - 1 < seconds_to_find(run, cut_at) < HEARTBEAT + 2 + SLACK
    assert "host 1 (beta) is lost: nothing was heard of it for 3." in err
    assert "1 process on host 0 (alpha)" in err


def test_a_name_that_leads_to_itself_and_a_missing_host_are_refused(hosts, tmp_path):
    run = tmp_path / "run"
    with start(hosts, 0, run) as alpha, start(hosts, 1, run, names=False) as beta:
        _, err = alpha.communicate(timeout=300)
        _, other = beta.communicate(timeout=30)
    assert (alpha.returncode, beta.returncode) == (1, 1)
    assert "process 1 gave up, see above; no restart helps" in err
    assert "[1] fnml: this host's name, beta, resolves to a loopback address" in other
    with start(hosts, 0, run, "--start-timeout", 1) as alpha:
        _, err = alpha.communicate(timeout=60)
    assert alpha.returncode == 1
    assert "host 1 of 2 has not called at alpha:8476 within 1 s (here: 0 (alpha))" in err
