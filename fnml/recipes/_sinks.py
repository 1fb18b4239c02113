"""Where a run's rows go, by name."""

from pathlib import Path

from fnml import sinks
from fnml.core import ConfigError, Sink, nearest, require
from fnml.recipes._plugins import load_plugin, plugins
from fnml.recipes._recipe import Output


def check_sinks(output: Output) -> None:
    """Refuse sinks that there are not, that are named twice, or whose package is missing.

    Raises:
      ConfigError: see above.
      MissingExtraError: an optional package is not installed.
    """
    twice = sorted({name for name in output.sinks if output.sinks.count(name) > 1})
    if twice:
        raise ConfigError(f"the sinks {', '.join(twice)} are named twice: every row goes once")
    known = {*_BUILT_IN, *(p.name for p in plugins() if p.group == "fnml.sinks")}
    for name in output.sinks:
        if name not in known:
            raise ConfigError(
                f"there is no sink {name!r}.{nearest(name, known)} There are: "
                f"{', '.join(sorted(known))}"
            )
        if name not in _BUILT_IN:
            load_plugin("fnml.sinks", name)
        elif module := _BUILT_IN[name]:
            require(module, extra=name)


# The package that a sink needs, of the extra of the sink's own name.
_BUILT_IN = {
    "jsonl": None,
    "csv": None,
    "tensorboard": "tensorboard",
    "prometheus": "prometheus_client",
}


def open_sink(name: str, directory: Path, after: int | None, output: Output) -> Sink:
    """Open a sink of a run, which keeps its rows up to the step ``after`` (all anew for ``None``)."""
    if name == "jsonl":
        return sinks.Jsonl(directory / "metrics.jsonl", after)
    if name == "csv":
        return sinks.Csv(directory / "metrics.csv", after)
    if name == "tensorboard":
        return sinks.TensorBoard(directory / "tensorboard", after)
    if name == "prometheus":
        return sinks.Prometheus(
            port=output.prometheus_port,
            textfile=directory / "metrics.prom",
            labels={"run": directory.name},
        )
    return load_plugin("fnml.sinks", name)(directory, after)
