"""Two hosts on one machine: network namespaces with a cable between them, each with its name."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys

import pytest

NAMES = ("alpha", "beta")
_NET = "10.87.65"


def _ip(*words, check=True):
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True)


class Hosts:
    """Run commands on one of two hosts, kill a host, and pull the cable."""

    def __init__(self, folder):
        self.namespaces = [f"fnml{os.getpid()}{name[0]}" for name in NAMES]
        self.addresses = [f"{_NET}.{i + 1}" for i in range(2)]
        self._hosts = folder / "hosts"
        lines = [f"{a} {n}" for a, n in zip(self.addresses, NAMES, strict=True)]
        self._hosts.write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")

    def make(self):
        for namespace in self.namespaces:
            _ip("netns", "add", namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
        a, b = self.namespaces
        _ip("-n", a, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", b)
        for namespace, address in zip(self.namespaces, self.addresses, strict=True):
            _ip("-n", namespace, "addr", "add", f"{address}/24", "dev", "cable")
            _ip("-n", namespace, "link", "set", "cable", "up")

    def cable(self, state):
        _ip("-n", self.namespaces[1], "link", "set", "cable", state)

    def pids(self, host):
        return [int(pid) for pid in _ip("netns", "pids", self.namespaces[host]).stdout.split()]

    def kill(self, host):
        for pid in self.pids(host):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def popen(self, host, *words, names=True, **options):
        """Start a command on a host; with ``names=False`` the host's name means itself alone."""
        shell = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
        hosts = self._hosts
        if not names:
            hosts = self._hosts.with_name("loopback")
            hosts.write_text(self._hosts.read_text().replace(self.addresses[host], "127.0.1.1"))
        return subprocess.Popen(
            [
                *["ip", "netns", "exec", self.namespaces[host]],
                *["unshare", "--uts", "--mount", "sh", "-c", shell, NAMES[host], str(hosts)],
                *map(str, words),
            ],
            **options,
        )

    def close(self):
        for host in range(2):
            self.kill(host)
        for namespace in self.namespaces:
            _ip("netns", "del", namespace, check=False)


@contextlib.contextmanager
def two_hosts(folder):
    """Make two hosts, or skip the test where that may not be done."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need Linux, root and the ip command")
    hosts = Hosts(folder)
    try:
        try:
            hosts.make()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        yield hosts
    finally:
        hosts.close()
