"""Prometheus: scraped by its own parser and, where there is one, by a real server."""

import json
import logging
import math
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

import prometheus_client
import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse

from fnml.core import ConfigError, MissingExtraError, Row
from fnml.sinks import Prometheus

ROW = Row(
    300,
    "train",
    {"loss": 0.1, "worst": math.inf, "none": math.nan},
    {"steps_per_second": 12.5, "samples_per_second": 1600.0},
)


@pytest.fixture
def sink():
    sink = Prometheus(port=0, labels={"run": 'digits "3"'})
    yield sink
    sink.close()


def scrape(port, accept="text/plain"):
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=10) as reply:
        return reply.read().decode()


def samples(text, parser=parse):
    return {sample.name: sample for family in parser(text) for sample in family.samples}


def test_a_scrape_sees_the_newest_numbers(sink):
    before = time.time()
    sink.write(Row(299, "eval", {"accuracy": 0.5}))
    sink.write(ROW)
    found = samples(scrape(sink.port))
    stamp = found.pop("fnml_row_timestamp_seconds").value
    assert before - 1 <= stamp <= time.time() + 1
    assert math.isnan(found.pop("fnml_train_none").value)
    assert {name: sample.value for name, sample in found.items()} == {
        "fnml_steps_total": 300.0,
        "fnml_train_loss": 0.1,
        "fnml_train_worst": math.inf,
        "fnml_eval_accuracy": 0.5,
        "fnml_steps_per_second": 12.5,
        "fnml_samples_per_second": 1600.0,
    }
    assert all(sample.labels == {"run": 'digits "3"'} for sample in found.values())
    types = {family.name: family.type for family in parse(scrape(sink.port))}
    assert types["fnml_steps"] == "counter"
    assert {kind for name, kind in types.items() if name != "fnml_steps"} == {"gauge"}


def test_the_openmetrics_format_holds_too(sink):
    sink.write(ROW)
    text = scrape(sink.port, "application/openmetrics-text; version=1.0.0")
    found = samples(text, parse_openmetrics)
    assert found["fnml_steps_total"].value == 300.0
    assert found["fnml_train_loss"].value == 0.1


def test_before_the_first_row_a_scrape_is_empty(sink):
    assert scrape(sink.port) == ""


def test_a_scrape_never_mixes_two_rows(sink):
    sink.write(Row(0, "train", {"a": 0.0, "b": 0.0}))
    stop = threading.Event()

    def write():
        step = 0
        while not stop.is_set():
            step += 1
            sink.write(Row(step, "train", {"a": float(step), "b": float(step)}))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(100):
            found = samples(scrape(sink.port))
            names = ("fnml_steps_total", "fnml_train_a", "fnml_train_b")
            assert len({found[name].value for name in names}) == 1
    finally:
        stop.set()
        writer.join()


def test_it_listens_on_loopback_only_and_frees_the_port():
    sink = Prometheus(port=0)
    port = sink.port
    threads = threading.active_count()
    assert sink._server.server_address[0] == "127.0.0.1"
    sink.close()
    assert sink.port is None
    assert threading.active_count() == threads - 1
    with pytest.raises(urllib.error.URLError):
        scrape(port)
    again = Prometheus(port=port)
    assert again.port == port
    again.close()


def test_a_taken_port_is_named():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: Address already in use.*or 0"):
            Prometheus(port=port)


def test_two_sinks_share_nothing(sink):
    other = Prometheus(port=0)
    sink.write(Row(1, "train", {"loss": 1.0}))
    other.write(Row(2, "train", {"loss": 2.0}))
    assert samples(scrape(sink.port))["fnml_train_loss"].value == 1.0
    assert samples(scrape(other.port))["fnml_train_loss"].value == 2.0
    other.close()
    assert "fnml" not in prometheus_client.generate_latest().decode()


def test_names_that_collide_stay_apart(sink, caplog):
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            sink.write(
                Row(
                    step,
                    "eval",
                    {"top-5": 1.0, "top 5": 2.0, "top_5": 3.0, "größe": 4.0},
                    {"eval/top-5": 5.0, "steps_total": 6.0},
                )
            )
    found = {
        name: sample.value
        for name, sample in samples(scrape(sink.port)).items()
        if "timestamp" not in name
    }
    assert found.pop("fnml_eval_top_5") == 1.0
    assert found.pop("fnml_steps_total") == 2.0
    assert found.pop("fnml_eval_gr__e") == 4.0
    assert sorted(found.values()) == [2.0, 3.0, 5.0, 6.0]
    assert all(name.startswith(("fnml_eval_top_5_", "fnml_steps_total_")) for name in found)
    # One warning for each, not one for each row.
    assert len(caplog.records) == 4
    assert "'eval/top-5' and 'eval/top 5'" in caplog.text


def test_a_late_collision_gets_the_same_name_in_every_run(sink):
    sink.write(Row(1, "eval", {"top-5": 1.0, "top 5": 2.0}))
    assert samples(scrape(sink.port))["fnml_eval_top_5_098105c1"].value == 2.0


def test_the_text_file_is_replaced_whole_and_stays(tmp_path):
    path = tmp_path / "made" / "run.prom"
    sink = Prometheus(textfile=path)
    assert sink.port is None
    sink.write(ROW)
    first = path.stat().st_ino
    assert samples(path.read_text())["fnml_train_loss"].value == 0.1
    with path.open() as reader:
        sink.write(Row(301, "train", {"loss": 0.2}))
        assert samples(reader.read())["fnml_steps_total"].value == 300.0
    assert path.stat().st_ino != first
    sink.close()
    assert samples(path.read_text())["fnml_train_loss"].value == 0.2
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "neither port nor textfile"),
        ({"port": 65536}, "port is 65536: expected 0"),
        ({"port": -1}, "port is -1"),
        ({"textfile": "run.txt"}, r"\.prom"),
        ({"port": 0, "labels": {"a-b": "x", "__c": "y"}}, "(?s)'a-b' is not.*'__c' is not"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        Prometheus(**options)


def test_a_missing_package_names_the_extra(monkeypatch):
    for module in [name for name in sys.modules if name.split(".")[0] == "prometheus_client"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fnml\[prometheus\]'"):
        Prometheus(port=0)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus server on the PATH")
def test_a_real_prometheus_server_collects_the_numbers(sink, tmp_path):
    sink.write(ROW)
    config = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [
            {"job_name": "fnml", "static_configs": [{"targets": [f"127.0.0.1:{sink.port}"]}]}
        ],
    }
    # JSON is YAML.
    (tmp_path / "prometheus.yml").write_text(json.dumps(config))
    address = f"127.0.0.1:{free_port()}"
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={tmp_path / 'prometheus.yml'}",
                f"--storage.tsdb.path={tmp_path / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=log,
        )
    try:

        def ask(query):
            url = f"http://{address}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
            with urllib.request.urlopen(url, timeout=10) as reply:
                return json.load(reply)["data"]["result"]

        deadline = time.monotonic() + 60
        result = []
        while not result:
            assert server.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)
            try:
                result = ask("fnml_train_loss")
            except urllib.error.URLError:
                continue
        (series,) = result
        assert series["value"][1] == "0.1"
        assert series["metric"]["run"] == 'digits "3"'
        assert ask("fnml_steps_total")[0]["value"][1] == "300"
        assert ask("up")[0]["value"][1] == "1"
    finally:
        server.terminate()
        server.wait(timeout=30)
