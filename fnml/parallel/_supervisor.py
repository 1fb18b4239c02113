"""Start the processes of a run, watch over them, and start them again where one is lost."""

import contextlib
import json
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fnml.core import RunError
from fnml.parallel._awake import Awake
from fnml.parallel._hosts import Here, Host, Order, There
from fnml.parallel._launch_options import Launch
from fnml.parallel._link import Link, Listener
from fnml.parallel._ranks import Ranks
from fnml.parallel._shrink import Size, shrink
from fnml.parallel._story import Story
from fnml.parallel._watchdog import Patience, Seen, how_ended, stuck

TICK = 0.05
_SETTLE = 0.5  # one loss ends other processes, too: look which was the first
_FAREWELL = 2.0
_LONGEST_PAUSE = 60.0
_REFUSED = (1, 2)  # exit codes of a command that said why it will not do what was asked


class Ending(NamedTuple):
    """How an attempt ended, with the exit code and a sentence."""

    kind: Literal["done", "stopped", "refused", "failed"]
    code: int
    text: str


class Supervisor:
    """Lead a run's hosts, of which this is number 0.

    Args:
      launch: the options.
      program: what to run, as it was given.
      fnml: whether that is a command of ours, which reports how it gets on and can be resumed.
      ranks: this host's processes.
      signals: returns the signals that this launcher has got so far.
    """

    def __init__(
        self,
        launch: Launch,
        program: Sequence[str],
        fnml: bool,
        ranks: Ranks,
        signals: Callable[[], Sequence[int]],
    ) -> None:
        self._launch, self._program, self._fnml = launch, [*program], fnml
        self._ranks, self._signals = ranks, signals
        self._story = Story()
        self._clock = Awake()
        here = Here(0, socket.gethostname(), launch.processes, ranks, program, fnml)
        self._hosts: dict[int, Host] = {0: here}
        self._callers: list[Link] = []
        self._listener: Listener | None = None
        self._used: list[Host] = []
        self._coordinator = ""
        self._run: dict[str, Any] | None = None
        self._began: int | None = None
        self._beat_at = 0.0

    def run(self) -> int:
        """Train to the end, with restarts where they are needed; return the exit code.

        Raises:
          RunError: hosts do not come, or processes are lost more often than may be.
        """
        code = 1
        try:
            if self._launch.hosts > 1:
                self._listen()
            code = self._attempts()
            return code
        finally:
            self._ranks.end()
            self._dismiss(code)
            if self._listener is not None:
                self._listener.close()

    def _dismiss(self, code: int) -> None:
        """Tell the other hosts that all is over, and let them hang up, so that they hear of it."""
        links = [host.link for host in self._hosts.values() if isinstance(host, There)]
        for link in links:
            link.send({"end": code})
        end = self._clock.now() + _FAREWELL
        while any(link.lost is None for link in links) and self._clock.now() < end:
            time.sleep(TICK)
        for link in links:
            link.close()

    def _listen(self) -> None:
        try:
            self._listener = Listener(self._launch.address, self._launch.heartbeat)
        except OSError as error:
            raise RunError(
                f"--coordinator {self._launch.coordinator} cannot be listened at: {error}. It has "
                "to be an address of host 0 and a free port"
            ) from error

    def _attempts(self) -> int:
        launch, story = self._launch, self._story
        self._await_hosts("start")
        full = sum(host.processes for host in self._hosts.values())
        most, fruitless, saved = full, 0, self._saved()
        for attempt in range(launch.restarts + 1):
            size = self._size(full, most)
            self._start(size)
            ending = self._watch()
            story.tell(ending.kind, ending.text, restarts=attempt)
            if ending.kind == "done":
                return 0
            self._stop_all()
            if ending.kind != "failed":
                return ending.code
            if self._finished():
                story.tell("done", "the run had finished before")
                return 0
            before, saved = saved, self._saved()
            fruitless = 0 if saved > before else fruitless + 1
            if fruitless > 1 and launch.elastic:
                most = max(min(most, size.processes) - 1, launch.elastic)
            if attempt < launch.restarts:
                pause = min(launch.pause * 2**fruitless, _LONGEST_PAUSE)
                story.tell(
                    "restart",
                    f"restart {attempt + 1} of {launch.restarts} in {pause:g} s, from "
                    + (f"the newest whole checkpoint (step {saved})" if saved else "the beginning"),
                    step=saved,
                )
                if self._sleep(pause):
                    return 128 + self._signals()[0]
        run = self._run
        again = f" Continue it with: fnml resume {run['directory']}" if run is not None else ""
        raise RunError(
            f"given up after {launch.restarts} restarts; the last failure: {ending.text}.{again}"
        )

    def _size(self, full: int, most: int) -> Size:
        """Decide with how many processes to go on."""
        self._sleep(0)
        there = sum(host.processes for host in self._hosts.values() if host.lost is None)
        if min(there, most) < full and self._launch.elastic:
            available = min(there, most)
            if not self._fnml and available >= self._launch.elastic:
                return Size(available, 0)
            if self._run is not None:
                size = Size(full, self._run["devices"])
                found = shrink(size, self._run["shards"], available, self._launch.elastic)
                if found is not None:
                    return found
        if there < full:
            self._await_hosts("go on")
        return Size(full, self._run["devices"] if self._run is not None else 0)

    def _await_hosts(self, what: str) -> None:
        """Wait until every host's launcher is connected."""
        launch, begun, told = self._launch, self._clock.now(), False
        while missing := self._missing():
            listing = ", ".join(map(str, missing))
            if self._clock.now() - begun > launch.start_timeout:
                here = ", ".join(
                    f"{i} ({host.name})" for i, host in self._hosts.items() if host.lost is None
                )
                raise RunError(
                    f"host {listing} of {launch.hosts} has not called at {launch.coordinator} "
                    f"within {launch.start_timeout} s (here: {here}). Run the same 'fnml launch' "
                    f"there, with --host {missing[0]}, and look whether it reaches that address "
                    "(name, port, firewall)"
                )
            if not told:
                told = True
                self._story.tell(
                    "waiting",
                    f"waiting at {launch.coordinator} for host {listing} of {launch.hosts} to "
                    f"{what}, up to {launch.start_timeout} s",
                )
            if self._sleep(TICK):
                raise RunError("stopped while waiting for the other hosts")

    def _missing(self) -> list[int]:
        known = {i for i, host in self._hosts.items() if host.lost is None}
        return [i for i in range(self._launch.hosts) if i not in known]

    def _sleep(self, seconds: float) -> bool:
        """Stay in touch with the hosts for a while; return whether a signal came."""
        end = self._clock.now() + seconds
        while True:
            self._touch()
            if self._signals() or self._clock.now() >= end:
                return bool(self._signals())
            time.sleep(TICK)

    def _touch(self) -> None:
        """Take calls, and let the other hosts know that this one is there."""
        now = self._clock.now()
        if now - self._beat_at > self._launch.heartbeat / 4:
            self._beat_at = now
            for host in self._hosts.values():
                if isinstance(host, There) and host.lost is None:
                    host.link.send()
        while self._listener is not None and (link := self._listener.call()) is not None:
            self._callers.append(link)
        for link in [*self._callers]:
            hello = link.receive()
            if hello is not None:
                self._callers.remove(link)
                self._greet(link, hello)
            elif link.lost:
                self._callers.remove(link)
                link.close()

    def _greet(self, link: Link, hello: dict[str, Any]) -> None:
        """Take a host in, or say why not."""
        index, processes = hello.get("host"), hello.get("processes")
        hosts, reason = self._launch.hosts, None
        if not (isinstance(index, int) and isinstance(processes, int)):
            link.close()  # no launcher of ours
            return
        known = self._hosts.get(index)
        if not 0 < index < hosts:
            reason = f"this run has the hosts 1 to {hosts - 1} beside the leading one, not {index}"
        elif known is not None and known.lost is None:
            reason = f"host {index} is here already: {known.name}"
        elif hello.get("program") != self._program:
            reason = f"host 0 runs '{' '.join(self._program)}': give the same command everywhere"
        if reason is not None:
            link.send({"refused": reason})
            link.close()
            return
        link.send({"welcome": True})
        host = There(index, str(hello.get("name")), processes, link)
        self._hosts[index] = host
        if known is not None:
            # There is no joining a run that is under way.
            self._story.tell("back", f"host {index} ({host.name}) is back, for the next restart")

    def _start(self, size: Size) -> None:
        hosts = [h for _, h in sorted(self._hosts.items()) if h.lost is None]
        address = "127.0.0.1" if self._launch.hosts == 1 else self._launch.address[0]
        with socket.create_server((address, 0)) as probe:
            self._coordinator = f"{address}:{probe.getsockname()[1]}"
        resume = None
        if self._run is not None and Path(self._run["directory"], "config.json").exists():
            resume = {"directory": self._run["directory"], "devices": size.devices}
        self._used, self._began, first = [], None, 0
        for host in hosts:
            here = min(host.processes, size.processes - first)
            if here:
                order = Order(
                    first=first,
                    here=here,
                    count=size.processes,
                    coordinator=self._coordinator,
                    bind=self._coordinator,
                    resume=resume,
                    # The launcher speaks first; a process's own word is for when it is gone.
                    timeout=self._launch.start_timeout + 60,
                )
                host.start(order)
                self._used.append(host)
                first += here
        names = ", ".join(f"{host.index} ({host.name})" for host in self._used)
        self._story.tell(
            "start",
            f"{size.processes} process{'es' * (size.processes > 1)} on host {names}, coordinator "
            f"{self._coordinator}",
            processes=size.processes,
            devices=size.devices or None,
        )

    def _watch(self) -> Ending:
        """Watch over the processes until all have ended, or something is wrong."""
        launch, sent, failing = self._launch, 0, None
        patience = Patience(launch.start_timeout, launch.first_step, launch.watchdog)
        if not self._fnml:
            patience = Patience(float("inf"), float("inf"), launch.watchdog)
        while True:
            self._touch()
            self._read_run()
            signals = self._signals()
            for number in signals[sent:]:
                self._forward(number, again=sent > 0)
                sent += 1
            lost = [f"host {h.index} ({h.name}) is lost: {h.lost}" for h in self._used if h.lost]
            if lost:
                return Ending("failed", 1, "; ".join(lost))
            seen = self._seen()
            if seen is not None:
                ended = {one.process: one.code for one in seen if one.code is not None}
                if len(ended) == len(seen) and not any(ended.values()):
                    return Ending("done", 0, "all processes have ended well")
                now = self._clock.now()
                if any(ended.values()):
                    failing = now if failing is None else failing
                    settle = launch.grace if self._clean(ended, signals) else _SETTLE
                    if len(ended) == len(seen) or now - failing > settle:
                        return self._judge(ended, len(seen), signals)
                elif reason := stuck(seen, patience, self._coordinator):
                    return Ending("failed", 1, reason)
            time.sleep(TICK)

    def _seen(self) -> list[Seen] | None:
        """Return how all processes are; ``None`` while a host has not said."""
        found: list[Seen] = []
        for host in self._used:
            part = host.seen()
            if part is None:
                return None
            found += part
        return found

    @staticmethod
    def _clean(ended: dict[int, int], signals: Sequence[int]) -> bool:
        """Tell whether processes end as one does that was asked to stop."""
        fine = {0, 128 + signal.SIGTERM} | {-number for number in signals}
        return set(ended.values()) <= fine

    def _judge(self, ended: dict[int, int], count: int, signals: Sequence[int]) -> Ending:
        """Say what it means that these processes have ended."""
        if self._clean(ended, signals) and len(ended) == count:
            return Ending(
                "stopped", 128 + signal.SIGTERM, "stopped by a signal, all processes alike"
            )
        refused = [i for i, code in ended.items() if code in _REFUSED]
        if self._fnml and refused:
            i = refused[0]
            return Ending("refused", ended[i], f"process {i} gave up, see above; no restart helps")
        # A signal, or a code of its own, says more than the exit of one that missed the others.
        bad = {i: code for i, code in ended.items() if code}
        weight = {-signal.SIGABRT: 2, 75: 1}
        i = min(bad, key=lambda i: weight.get(bad[i], 0))
        text = f"process {i} {how_ended(bad[i])}"
        if signals:
            return Ending("stopped", 1, f"stopped by a signal, but {text}: not all saved the end")
        return Ending("failed", 1, text)

    def _forward(self, number: int, *, again: bool) -> None:
        name = signal.Signals(number).name
        if again:
            self._story.tell("kill", f"{name} again: the processes are killed")
        else:
            self._story.tell("stop", f"{name}: the processes are asked to stop after a step")
        for host in self._used:
            host.send(signal.SIGKILL if again else number)

    def _stop_all(self) -> None:
        """End what still runs: TERM, a while for a save at work, KILL."""
        for number, wait in ((signal.SIGTERM, self._launch.grace), (signal.SIGKILL, 10.0)):
            begun = self._clock.now()
            for host in self._used:
                if host.lost is None:
                    host.send(number)
            while self._running() and self._clock.now() - begun < wait:
                self._touch()
                time.sleep(TICK)

    def _running(self) -> bool:
        parts = [host.seen() for host in self._used if host.lost is None]
        return any(part is None or any(one.code is None for one in part) for part in parts)

    def _read_run(self) -> None:
        """Learn from process 0 what is trained, and where it began."""
        if self._began is not None:
            return
        try:
            found = json.loads((self._ranks.directory / "run").read_text())
        except (OSError, ValueError):
            return
        if self._run is None or self._run["directory"] != found["directory"]:
            self._run = found
            self._story.settle(Path(found["directory"]))
        if found.get("step") is not None:
            self._began = found["step"]
            self._story.tell("training", f"training from step {self._began}", step=self._began)

    def _saved(self) -> int:
        """Return the newest checkpoint's step, 0 for none."""
        if self._run is None:
            return 0
        with contextlib.suppress(OSError):
            names = [path.name for path in Path(self._run["directory"], "checkpoints").iterdir()]
            return max((int(name) for name in names if name.isdecimal()), default=0)
        return 0

    def _finished(self) -> bool:
        return self._run is not None and Path(self._run["directory"], "result.json").exists()
