"""How long does a zoo model take to leave as ONNX, beside jax2onnx?

Run: ``python benchmarks/onnx_export.py --peer PYTHON``, where PYTHON is an interpreter with jax2onnx
(``python -m venv peer; peer/bin/pip install jax2onnx``). Each library runs in processes of its own,
by turns; a process exports each model several times. The table shows CPU seconds, tracing and
ONNX's checker included. Without --peer, fnml alone is measured.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
EXPORTS = 5


def programs() -> dict[str, tuple[Callable[..., Any], Any, Any]]:
    """Return a function, its parameters and its input for each line of the table."""
    import jax
    import jax.numpy as jnp

    from fnml.core import init
    from fnml.models import CNNConfig, GPTConfig, MLPConfig, cnn, gpt, mlp

    key = jax.random.key(0)
    perceptron = mlp(MLPConfig(inputs=64, hidden=(256, 256), outputs=10))
    network = cnn(CNNConfig(classes=10, widths=(16, 32), pool=2))
    language = gpt(GPTConfig(vocab=256, width=128, layers=4, heads=4, context=128))
    state = init(network.state, key)

    def look(params: Any, x: Any) -> Any:
        return network.apply(params, x, state=state, train=False)[0]

    tokens = jnp.zeros((2, 64), jnp.int32)
    image, row = jnp.ones((2, 28, 28, 1)), jnp.ones((4, 64))
    forward = {
        "mlp": (perceptron.apply, init(perceptron.spec, key), row),
        "cnn": (look, init(network.spec, key), image),
        "gpt": (language.apply, init(language.spec, key), tokens),
    }

    def gradient(apply: Callable[..., Any]) -> Callable[..., Any]:
        return jax.grad(lambda params, x: (apply(params, x) ** 2).mean())

    backward = {f"{name}, gradient": (gradient(f), p, x) for name, (f, p, x) in forward.items()}
    return forward | backward


def export(library: str, function: Any, params: Any, x: Any) -> int:
    """Export once, and return the number of nodes."""
    import jax

    if library == "fnml":
        from fnml.interop.onnx import to_onnx

        return len(to_onnx(function, x, params=params).graph.node)
    from jax2onnx import to_onnx as peer

    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    # A new function each time: what the peer has traced once, it keeps.
    return len(peer(lambda x: function(params, x), inputs=[shape]).graph.node)


def child(library: str) -> None:
    """Export every program several times; print seconds, nodes or the error as JSON."""
    found: dict[str, Any] = {}
    for name, (function, params, x) in programs().items():
        try:
            seconds = []
            for _ in range(EXPORTS):
                began = time.process_time()
                nodes = export(library, function, params, x)
                seconds.append(time.process_time() - began)
            found[name] = {"first": seconds[0], "seconds": seconds[1:], "nodes": nodes}
        except Exception as error:  # noqa: BLE001 (whatever a peer raises is its result)
            found[name] = {"error": f"{type(error).__name__}: {error}".split("\n")[0][:60]}
    print("RESULT " + json.dumps(found))


def measure(python: str, library: str) -> dict[str, Any]:
    """Run one child; return what it found, or the reason why there is nothing."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [python, __file__, "--child", library],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
    )
    lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    if not lines:
        last = (done.stderr.strip() or "no output").splitlines()[-1]
        return {"": {"error": f"{library} did not run: {last[:90]}"}}
    return json.loads(lines[-1].removeprefix("RESULT "))


def shown(results: list[dict[str, Any]], name: str) -> str:
    """Return one cell: the first export, the median of later ones, the nodes."""
    entries = [result.get(name) or result.get("") for result in results]
    for entry in entries:
        if entry is None or "error" in entry:
            return "-" if entry is None else entry["error"]
    first = statistics.median(entry["first"] for entry in entries)
    later = statistics.median(s for entry in entries for s in entry["seconds"])
    return f"{first:.2f} s, then {later:.2f} s; {entries[0]['nodes']} nodes"


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", help="a Python interpreter that has jax2onnx")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    contestants = {"fnml": sys.executable}
    if options.peer:
        contestants["jax2onnx"] = options.peer
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    for turn in range(options.rounds):
        for name in list(contestants)[:: 1 if turn % 2 else -1]:
            results[name].append(measure(contestants[name], name))
    from rich import print
    from rich.table import Table

    table = Table("exported", *contestants)
    for name in results["fnml"][0]:
        table.add_row(name, *(shown(results[library], name) for library in contestants))
    if not options.peer:
        table.caption = "jax2onnx was left out: no --peer was given"
    print(table)


if __name__ == "__main__":
    main()
