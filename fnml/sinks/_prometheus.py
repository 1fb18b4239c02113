"""Rows as Prometheus metrics: scraped over HTTP, or left in a file for the node exporter."""

import logging
import re
import time
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fnml.core import ConfigError, Row, require

_LABEL = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*\Z")
_TIME = "time/"
_RESERVED = dict.fromkeys(("fnml_steps", "fnml_steps_total", "fnml_row_timestamp_seconds"), "fnml")


def _plain_name(source: str) -> str:
    return "fnml_" + re.sub(r"[^a-zA-Z0-9]", "_", source.removeprefix(_TIME))


class _Snapshot:
    """What a scrape sees: a collector whose families are replaced as a whole."""

    def __init__(self) -> None:
        self.families: tuple[Any, ...] = ()

    def collect(self) -> Iterable[Any]:
        return self.families


class Prometheus:
    """Show the newest numbers to Prometheus (extra ``prometheus``).

    The metrics are gauges: ``fnml_train_loss``, ``fnml_eval_accuracy`` and, for timing,
    ``fnml_samples_per_second``; each keeps its last value. The counter ``fnml_steps_total`` is
    the step, and ``fnml_row_timestamp_seconds`` the Unix time of the last row, for an alert on a
    run that stands still. A scrape sees all numbers of a row or none.

    Names: ``fnml_<kind>_<metric>`` or ``fnml_<timing>``, with each character but ASCII letters
    and digits replaced by ``_``. When that gives two sources one name, the one that came first
    keeps it, the other gets ``_`` and the CRC-32 of its own name in hexadecimal, and a warning is
    logged: a late metric must not stop a run.

    Args:
      port: serve ``http://127.0.0.1:<port>/metrics``, for this host only; 0 takes a free port
        (see :attr:`port`); ``None`` serves nothing.
      textfile: a ``.prom`` file that each row replaces atomically, for the node exporter's
        textfile collector. It stays after :meth:`close`.
      labels: labels of every metric, such as ``{"run": "digits-3"}``.

    Raises:
      ConfigError: neither a port nor a file, a port that is taken or not allowed, a file whose
        name does not end in ``.prom``, or a label name that Prometheus does not take.
      MissingExtraError: the package ``prometheus_client`` is not installed.

    >>> import urllib.request
    >>> sink = Prometheus(port=0)
    >>> sink.write(Row(10, "train", {"loss": 0.5}))
    >>> with urllib.request.urlopen(f"http://127.0.0.1:{sink.port}/metrics") as reply:
    ...     "fnml_train_loss 0.5" in reply.read().decode()
    True
    >>> sink.close()
    """

    def __init__(
        self,
        port: int | None = None,
        textfile: Path | str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        self._textfile = None if textfile is None else Path(textfile).absolute()
        self._labels = dict(labels or {})
        _check(port, self._textfile, self._labels)
        self._client = require("prometheus_client", extra="prometheus")
        core = require("prometheus_client.core", extra="prometheus")
        self._gauge, self._counter = core.GaugeMetricFamily, core.CounterMetricFamily
        # An own registry: the client's global one belongs to the user's program.
        self._registry = self._client.CollectorRegistry()
        self._snapshot = _Snapshot()
        self._registry.register(self._snapshot)
        self._values: dict[str, float] = {}
        self._names: dict[str, str] = {}
        self._server, self._thread = None, None
        if self._textfile is not None:
            self._textfile.parent.mkdir(parents=True, exist_ok=True)
        if port is not None:
            try:
                self._server, self._thread = self._client.start_http_server(
                    port, addr="127.0.0.1", registry=self._registry
                )
            except OSError as error:
                raise ConfigError(
                    f"cannot serve metrics on 127.0.0.1:{port}: {error.strerror or error}. Choose "
                    "another port, or 0 for one that is free"
                ) from error

    def __repr__(self) -> str:
        return f"Prometheus(port={self.port}, textfile={self._textfile and str(self._textfile)!r})"

    @property
    def port(self) -> int | None:
        """The port being served, ``None`` without one."""
        return None if self._server is None else self._server.server_port

    def _name(self, source: str) -> str:
        """Return the metric name of a source, the same one each time."""
        if source not in self._names:
            owners = _RESERVED | {name: owner for owner, name in self._names.items()}
            name = _plain_name(source)
            if taken := owners.get(name):
                name += f"_{zlib.crc32(source.encode()):08x}"
                logging.getLogger(__name__).warning(
                    "%r and %r have the same Prometheus name: the second is shown as %s",
                    taken,
                    source,
                    name,
                )
            self._names[source] = name
        return self._names[source]

    def _family(self, kind: Any, name: str, text: str, value: float) -> Any:
        family = kind(name, text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def write(self, row: Row) -> None:
        """Show this row's numbers, and the last ones of the names that it does not have.

        Raises:
          OSError: the text file could not be written; the old one is kept.
        """
        numbers = {f"{row.kind}/{name}": value for name, value in row.values.items()}
        numbers |= {_TIME + name: value for name, value in row.timing.items()}
        for source, value in numbers.items():
            self._values[self._name(source)] = float(value)
        sources = {name: source for source, name in self._names.items()}
        self._snapshot.families = (
            self._family(self._counter, "fnml_steps", "Training steps done.", int(row.step)),
            self._family(
                self._gauge,
                "fnml_row_timestamp_seconds",
                "Unix time of the newest numbers.",
                time.time(),
            ),
            *(
                self._family(self._gauge, name, f"The newest {sources[name]}.", value)
                for name, value in self._values.items()
            ),
        )
        if self._textfile is not None:
            self._client.write_to_textfile(str(self._textfile), self._registry)

    def flush(self) -> None:
        """Do nothing: each row is visible when :meth:`write` returns."""

    def close(self) -> None:
        """Stop serving and free the port; the text file stays."""
        server, thread = self._server, self._thread
        self._server = self._thread = None
        if server is not None and thread is not None:
            server.shutdown()
            server.server_close()
            thread.join()


def _check(port: int | None, textfile: Path | None, labels: Mapping[str, str]) -> None:
    faults = []
    if port is None and textfile is None:
        faults.append("neither port nor textfile is given: nobody would see the metrics")
    if port is not None and not 0 <= port <= 65535:
        faults.append(f"port is {port}: expected 0 (a free one) to 65535")
    if textfile is not None and textfile.suffix != ".prom":
        faults.append(f"textfile is {textfile}: the node exporter only reads names in .prom")
    faults += [
        f"the label {name!r} is not a Prometheus label: letters, digits and _, "
        "not starting with a digit or __"
        for name in labels
        if not _LABEL.match(name)
    ]
    if faults:
        raise ConfigError("\n".join(faults))
