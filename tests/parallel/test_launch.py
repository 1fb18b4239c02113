"""Several processes have the bits of one, also where one of them is killed, frozen or stopped.

Nothing is simulated: processes are ended and stopped by the signals that end and stop them outside
of tests, too. Times are compared with the documented ones plus SLACK, as the two cores that these
tests run on are often shared with others.
"""

import os
import re
import signal
import subprocess
import sys
import time

import jax
import pytest
from launching import TINY, hurt, launcher, newest_step, outcome, ranks, rows, story, wait_until

from fnml.cli import main
from fnml.core import ConfigError
from fnml.parallel import Launch
from fnml.parallel._initialize import place

SLACK = 10.0
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def fnml(*arguments):
    """Run the command line in this process; return its exit code."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run in one process, with the same devices."""
    jax.devices()  # all of conftest's, before the run makes as many as it needs
    directory = tmp_path_factory.mktemp("launch") / "whole"
    assert fnml("train", *TINY, "--out", directory) == 0
    return directory


def assert_same(directory, whole):
    assert outcome(directory) == outcome(whole)
    assert rows(directory) == rows(whole)


def event(directory, kind):
    return next((at, text) for at, what, text in story(directory) if what == kind)


def test_a_killed_process_is_found_at_once_and_the_run_ends_with_the_same_bits(whole, tmp_path):
    run = tmp_path / "run"
    with launcher("-n", 2, "--grace", 1, "--", "train", *TINY, "--out", run) as process:
        wait_until(lambda: newest_step(run) >= 80, process)
        hurt(process, 1)
        hurt_at = time.time()
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert_same(run, whole)
    found_at, text = event(run, "failed")
    assert text == "process 1 was ended by SIGKILL"
    assert found_at - hurt_at < 2 + SLACK
    assert re.search(r"restart 1 of 3 in 1 s, from the newest whole checkpoint \(step \d+\)", err)
    # The result is spoken of once, and the others' lines have their number.
    assert out.count("params_sha256") == 1
    assert all(line.startswith("[1] ") for line in err.splitlines() if "Rank 1 is" in line)


def test_a_frozen_process_is_found_by_the_watchdog(whole, tmp_path):
    run = tmp_path / "run"
    options = ["-n", 2, "--watchdog", 5, "--grace", 1, "--", "train", *TINY, "--out", run]
    with launcher(*options) as process:
        wait_until(lambda: newest_step(run) >= 80, process)
        hurt(process, 0, signal.SIGSTOP)
        hurt_at = time.time()
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert_same(run, whole)
    found_at, text = event(run, "failed")
    assert re.fullmatch(
        r"process 0 has shown no sign of life for [5-9]\.\d s after step \d+ \(it is stopped: "
        r"state T\)",
        text,
    )
    assert 4 < found_at - hurt_at < 5 + SLACK


def test_stopped_by_sigterm_it_goes_on_to_the_same_bits(whole, tmp_path):
    run = tmp_path / "run"
    with launcher("-n", 2, "--", "train", *TINY, "--out", run) as process:
        wait_until(lambda: newest_step(run) >= 80, process)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 143, err
    stopped = int(re.search(r"stopped by SIGTERM after step (\d+)", out)[1])
    assert newest_step(run) == stopped < 400
    # A signal to one of them alone is agreed on, too.
    with launcher("-n", 2, "--", "resume", run) as process:
        wait_until(lambda: newest_step(run) > stopped, process)
        hurt(process, 1, signal.SIGTERM)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 143, err
    assert newest_step(run) < 400
    assert fnml("resume", run) == 0
    assert_same(run, whole)


def test_elastic_goes_on_with_one_process_after_two_losses_in_a_row(whole, tmp_path):
    run = tmp_path / "run"
    options = ["-n", 2, "--elastic", 1, "--grace", 0, "--pause", 0]
    starts = []

    def started():
        starts[:] = [at for at, what, _ in story(run) if what == "training"]
        return starts

    with launcher(*options, "--", "train", *TINY, "--save-every", 400, "--out", run) as process:
        for times in (1, 2):
            wait_until(lambda: (run / "supervisor.jsonl").exists(), process)
            wait_until(lambda n=times: len(started()) == n, process)
            hurt(process, 1)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert [text.split(" on ")[0] for _, what, text in story(run) if what == "start"] == [
        *["2 processes", "2 processes", "1 process"]
    ]
    assert outcome(run)[:3] == outcome(whole)[:3]


PROGRAM = """
import jax, numpy as np
from fnml.parallel import gathered, initialize, spread

processes = initialize(devices=4)
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
x = spread(np.arange(8.0, dtype=np.float32), jax.NamedSharding(mesh, jax.P("data")))
key = spread(jax.random.key(7), jax.NamedSharding(mesh, jax.P()))
here = sorted(int(shard.data[0]) for shard in x.addressable_shards)
whole = gathered({"x": x, "key": key})
print(processes.count, here, whole["x"].tolist(), jax.random.key_data(whole["key"]).tolist())
"""


def test_another_program_spreads_and_gathers_arrays(tmp_path, capfd):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    assert fnml("launch", "-n", "2", "--", sys.executable, str(path)) == 0
    lines = capfd.readouterr().out.splitlines()
    for expected in (
        f"2 [0, 2] {[*map(float, range(8))]} [0, 7]",
        f"[1] 2 [4, 6] {[*map(float, range(8))]} [0, 7]",
    ):
        # gloo prints from C++, and a piece of its lines may stand before ours.
        assert len([line for line in lines if line.endswith(expected)]) == 1, lines


def test_it_gives_up_after_the_last_restart(capfd):
    program = [sys.executable, "-c", "import sys; sys.exit(3)"]
    code = fnml("launch", "-n", "2", "--restarts", "1", "--pause", "0", "--", *program)
    assert code == 1
    err = capfd.readouterr().err
    assert "restart 1 of 1" in err
    assert "given up after 1 restarts; the last failure: process 0 ended with exit code 3" in err


def test_what_is_refused_is_not_tried_again(tmp_path, capfd):
    run = tmp_path / "run"
    code = fnml("launch", "-n", "2", "--", "train", *TINY, "--devices", "1", "--out", run)
    err = capfd.readouterr().err
    assert code == 1
    assert "devices=1: 2 processes have to have as many each; give --devices a multiple of 2" in err
    assert "no restart helps" in err
    assert "restart 1" not in err
    assert not run.exists()


def test_a_process_that_does_not_arrive_is_named(tmp_path):
    options = ["-n", 2, "--start-timeout", 6, "--restarts", 0, "--grace", 0]
    with launcher(*options, "--", "train", *TINY, "--out", tmp_path / "run") as process:
        wait_until(lambda: len(ranks(process)) == 2, process)
        hurt(process, 1, signal.SIGSTOP)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert re.search(
        r"process 1 has not arrived at the coordinator 127\.0\.0\.1:\d+ within 6 s \(arrived: 0\); "
        r"stopped \(state T\): 1",
        err,
    )


def test_without_a_launcher_a_process_says_for_whom_it_waits(tmp_path):
    alone = {
        "FNML_PROCESS_ID": "0",
        "FNML_PROCESS_COUNT": "2",
        "FNML_COORDINATOR_ADDRESS": "127.0.0.1:47651",
        "FNML_START_TIMEOUT": "2",
    }
    command = [sys.executable, "-m", "fnml", "train", *TINY, "--out", str(tmp_path / "run")]
    found = subprocess.run(
        command,
        env={**os.environ, **alone},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert found.returncode == 75
    assert "process 0 of 2 waited 2 s at 127.0.0.1:47651" in found.stderr
    assert "Aborted" not in found.stderr


def test_under_slurms_variables_it_has_the_same_bits(whole, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "fnml", "train", *TINY, "--out", str(run)]
    slurm = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
    }
    tasks = [
        subprocess.Popen(
            command,
            env={**os.environ, **slurm, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
            stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]
    try:
        errors = [task.communicate(timeout=300)[1] for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert [task.returncode for task in tasks] == [0, 0], errors
    assert_same(run, whole)


def test_the_clusters_that_jax_knows_are_found(monkeypatch):
    assert place() is None
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911")
    for name, value in (("SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    found = place()
    assert (found.index, found.count, found.local_devices) == (3, 4, [1])
    assert found.coordinator.startswith("10.96.0.1:")
    monkeypatch.setenv("FNML_CLUSTER", "off")
    assert place() is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "2"], "there is nothing to launch"),
        (["-n", "2", "--", "eval", "run"], "'fnml eval' runs in one process"),
        (["-n", "2", "--", "trian", "lm"], "there is no program 'trian', nor such a command"),
    ],
)
def test_what_cannot_be_launched_is_named(arguments, message, capsys):
    assert fnml("launch", *arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processes": 0, "grace": -1}, "processes=0: expected at least 1; grace=-1: expected at"),
        ({"hosts": 2}, "coordinator='': expected host:port of host 0"),
        ({"hosts": 2, "host": 2, "coordinator": "a:1"}, "host=2: expected 0 to 1"),
        ({"watchdog": 0}, "watchdog=0: expected more than 0"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Launch(**options)
