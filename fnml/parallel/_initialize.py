"""Join the processes of a run."""

import contextlib
import ctypes
import ipaddress
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from fnml.core import ConfigError
from fnml.parallel._processes import Processes
from fnml.parallel._pulse import Pulse

AGAIN = 75  # the exit code of sysexits.h for "try again": the cause lies outside this process
_PDEATHSIG = 1  # prctl's option, from <linux/prctl.h>
_TIMEOUT = 300


@dataclass(frozen=True)
class Place:
    """Where a process stands among the others.

    Attributes:
      index: which process it is.
      count: how many there are.
      coordinator: ``host:port`` of process 0.
      bind: the address that process 0 listens at, ``None`` for all of its host's.
      local: which process of its host it is, and how many are on that host.
      local_devices: the devices it may use, ``None`` for all that it sees.
      directory: where the launcher watches, ``None`` without one.
      timeout: seconds to wait for the others.
    """

    index: int
    count: int
    coordinator: str
    bind: str | None = None
    local: tuple[int, int] = (0, 1)
    local_devices: Sequence[int] | None = None
    directory: Path | None = None
    timeout: int = _TIMEOUT

    def environment(self) -> dict[str, str]:
        """Return the environment variables that tell a process its place."""
        return {
            "FNML_PROCESS_ID": str(self.index),
            "FNML_PROCESS_COUNT": str(self.count),
            "FNML_COORDINATOR_ADDRESS": self.coordinator,
            "FNML_COORDINATOR_BIND_ADDRESS": self.bind or "",
            "FNML_LOCAL_PROCESS": "{}/{}".format(*self.local),
            "FNML_LAUNCH_DIRECTORY": str(self.directory or ""),
            "FNML_START_TIMEOUT": str(self.timeout),
        }


def place(environ: Mapping[str, str] = os.environ) -> Place | None:
    """Find out this process's place: from a launcher's variables, else from the cluster.

    Returns:
      ``None`` for a process on its own.

    Raises:
      ConfigError: the variables are incomplete or contradict each other.

    >>> place({"FNML_CLUSTER": "off"}) is None
    True
    >>> place({"FNML_PROCESS_ID": "1", "FNML_PROCESS_COUNT": "2",
    ...        "FNML_COORDINATOR_ADDRESS": "node1:8476"}).coordinator
    'node1:8476'
    """
    if "FNML_PROCESS_COUNT" in environ:
        return _launched(environ)
    if environ.get("FNML_CLUSTER", "auto") == "off":
        return None
    # What jax.distributed.initialize() finds by itself, asked for beforehand: whether there are
    # several processes decides how many devices each makes, and is said when one does not come.
    from jax._src import clusters

    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, _TIMEOUT
    )
    coordinator, count, index, local_devices = found
    if coordinator is None or index is None or not count or count == 1:
        return None
    return Place(index, count, coordinator, local_devices=local_devices)


def _launched(environ: Mapping[str, str]) -> Place:
    def number(name: str, default: str | None = None) -> int:
        text = environ.get(name, default)
        try:
            return int(text if text is not None else "")
        except ValueError as error:
            raise ConfigError(
                f"{name} is {text!r}: expected a number, as 'fnml launch' sets it"
            ) from error

    index, count = number("FNML_PROCESS_ID"), number("FNML_PROCESS_COUNT")
    coordinator = environ.get("FNML_COORDINATOR_ADDRESS", "")
    local, _, locals_ = environ.get("FNML_LOCAL_PROCESS", "0/1").partition("/")
    if not 0 <= index < count or (count > 1 and not coordinator.rpartition(":")[2].isdecimal()):
        raise ConfigError(
            f"FNML_PROCESS_ID={index}, FNML_PROCESS_COUNT={count}, FNML_COORDINATOR_ADDRESS="
            f"{coordinator!r}: expected a process below the count, and host:port of process 0"
        )
    directory = environ.get("FNML_LAUNCH_DIRECTORY")
    return Place(
        index,
        count,
        coordinator,
        environ.get("FNML_COORDINATOR_BIND_ADDRESS") or None,
        (int(local), int(locals_)),
        None,
        Path(directory) if directory else None,
        number("FNML_START_TIMEOUT", str(_TIMEOUT)),
    )


def initialize(devices: int | None = None) -> Processes:
    """Join the other processes of this run, where there are any; call it before JAX is used.

    The place of this process comes from ``fnml launch``, or else from what JAX detects: SLURM,
    Open MPI, Kubernetes or a TPU pod. Where there is neither, this is one process on its own, and
    nothing happens. ``FNML_CLUSTER=off`` keeps JAX from looking.

    Unlike after ``jax.distributed.initialize``, SIGTERM still ends the process.

    Args:
      devices: how many devices the processes have together; on CPUs they are made, as many in each
        process. By default what each process has.

    Raises:
      ConfigError: the processes cannot share so many devices; there are more or fewer; or the name
        of this host resolves to the loopback address, where others would not find it.
    """
    found = place()
    if found is None:
        return Processes()
    _end_with_parent(found)
    pulse = Pulse(found.directory / f"pulse.{found.index}") if found.directory else None
    if pulse is not None:
        pulse.arrive(1)
    if found.count > 1 and not jax.distributed.is_initialized():
        _join(found, devices)
    if pulse is not None:
        pulse.arrive(2)
    return Processes(found.index, found.count, _client(found.count), found.directory, pulse)


def _join(found: Place, devices: int | None) -> None:
    count = found.count
    each, rest = divmod(devices or count, count)
    if rest or each < 1:
        raise ConfigError(
            f"devices={devices}: {count} processes have to have as many each; give --devices a "
            f"multiple of {count}, and --accumulate as many or more shards"
        )
    if devices is not None:
        jax.config.update("jax_num_cpu_devices", each)
    # It would take SIGTERM for itself. Ours is agreed on by Processes.agree.
    jax.config.update("jax_enable_preemption_service", False)
    own = found.local_devices
    if own is None and found.local[1] > 1:
        own = list(range(found.local[0] * each, (found.local[0] + 1) * each))
    with _deadline(found):
        jax.distributed.initialize(
            found.coordinator,
            count,
            found.index,
            own,
            cluster_detection_method="deactivate",
            initialization_timeout=found.timeout + 60,
            coordinator_bind_address=found.bind,
        )
        there = len(jax.devices())
    if jax.default_backend() == "cpu":
        _check_name(found.coordinator)
    if devices is not None and there != devices:
        raise ConfigError(
            f"devices={devices}: the {count} processes have {there} together; several processes "
            f"use all of theirs, so give --devices {there}"
        )


@contextlib.contextmanager
def _deadline(found: Place) -> Iterator[None]:
    """End the process with a sentence where JAX, later, would end it with a stack of addresses."""

    def late() -> None:
        who = "the other processes" if found.index == 0 else "process 0 and the others"
        print(
            f"fnml: process {found.index} of {found.count} waited {found.timeout} s at "
            f"{found.coordinator} (process 0's address) for {who}, and not all have arrived. Look "
            f"whether all {found.count} were started and are still there, and whether this host "
            "reaches that address (name, port, firewall)",
            file=sys.stderr,
            flush=True,
        )
        os._exit(AGAIN)

    timer = threading.Timer(found.timeout, late)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _check_name(coordinator: str) -> None:
    """Refuse a host name that gloo would tell the other hosts, and that leads them to themselves."""
    if _loopback(coordinator.rpartition(":")[0].strip("[]")):
        return  # all on one host
    name = socket.gethostname()
    if _loopback(name):
        raise ConfigError(
            f"this host's name, {name}, resolves to a loopback address, which the collectives on "
            f"CPUs (gloo) would tell the other hosts: give {name} this host's own address in "
            "/etc/hosts"
        )


def _loopback(host: str) -> bool:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return all(ipaddress.ip_address(str(at[0]).split("%")[0]).is_loopback for *_, at in found)


def _client(count: int) -> object:
    """Return the coordinator's store; what jax.experimental offers instead runs on the devices."""
    from jax._src import distributed

    return distributed.global_state.client if count > 1 else None


def _end_with_parent(found: Place) -> None:
    """See to it that this process does not outlive its launcher, however that one ends."""
    if found.directory is not None and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)
