"""How fast is fnml beside PyTorch and the other JAX libraries, on a CPU?

Run: ``python benchmarks/peers.py [--rows gpt_small,bert] [--peers fnml PyTorch] [--json FILE]``.
The same model, batches and initial weights, float32, AdamW, two threads. Every peer is a process
of its own, in its own environment (``FNML_TORCH_PYTHON``, ``FNML_PEERS_PYTHON``), and they take
turns: each does some steps while the others wait. Reported are medians over rounds with their
range, the rate of the row's FLOPs as a share of this machine's float32 matrix product, the most
memory the process held, the time to the end of the first step, and the loss after 50 steps.

Targets: 1.5 times the best PyTorch on the GPT and BERT rows, 1.15 on the CNN and ResNet rows, 3 on
the MLP; 1.5 times the best JAX library on the GPT and CNN rows; 60% of the matrix product's rate for
GPT d=256; no more memory than the peers.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from report import machine

sys.path.append(str(Path(__file__).parent / "peers"))
import problems

ROWS = [
    row
    for row in ("digits_mlp", "cnn", "resnet", "gpt_small", "gpt_medium", "bert")
    if hasattr(problems, row)
]


class Peer(NamedTuple):
    """A contestant: whose it is, its module in ``peers``, the variant, and its interpreter."""

    family: str
    module: str
    variant: str
    python: str | None
    named: str
    """The environment variable that names the interpreter."""
    rows: tuple[str, ...] = tuple(ROWS)
    """What it takes part in."""


def contestants() -> dict[str, Peer]:
    """Return every peer by name."""
    torch, libraries = (os.environ.get(f"FNML_{name}_PYTHON") for name in ("TORCH", "PEERS"))

    def of_torch(variant: str) -> Peer:
        return Peer("torch", "torch_rows", variant, torch, "FNML_TORCH_PYTHON")

    def of_jax(module: str, variant: str = "") -> Peer:
        return Peer("jax", module, variant, libraries, "FNML_PEERS_PYTHON")

    return {
        "fnml": Peer("fnml", "fnml_rows", "", sys.executable, ""),
        "fnml, 10 steps a call": Peer(
            "fnml", "fnml_rows", "fused", sys.executable, "", rows=("digits_mlp",)
        ),
        "fnml, native": Peer("fnml", "fnml_rows", "native", sys.executable, ""),
        "fnml, native, 10 steps a call": Peer(
            "fnml", "fnml_rows", "native fused", sys.executable, "", rows=("digits_mlp",)
        ),
        "PyTorch": of_torch("eager"),
        "PyTorch, malloc": of_torch("eager+malloc"),
        "PyTorch, compile": of_torch("compile"),
        "PyTorch, compile, malloc": of_torch("compile+malloc"),
        "flax.linen": of_jax("linen_rows"),
        "flax.nnx, nnx.jit": of_jax("nnx_rows", "nnx.jit"),
        "flax.nnx, jax.jit": of_jax("nnx_rows", "jax.jit"),
        "Equinox": of_jax("equinox_rows"),
        "Haiku": of_jax("haiku_rows"),
        "Keras": of_jax("keras_rows"),
    }


class Worker:
    """A peer's process, which works only while it is asked something."""

    def __init__(self, peer: Peer, row: str) -> None:
        script = Path(__file__).parent / "peers" / "worker.py"
        # OpenMP's threads spin for milliseconds, then sleep, as they do by default: made to sleep at
        # once (OMP_WAIT_POLICY=PASSIVE), they cost PyTorch three quarters of its speed at small steps.
        settings = {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "2"}
        self._process = subprocess.Popen(
            [str(peer.python), str(script), peer.module, row, peer.variant],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | settings,
        )
        self.built = self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker failed: {self._process.args}; its error is above")
        return json.loads(line)

    def ask(self, question: str) -> dict[str, Any]:
        self._process.stdin.write(f"{question}\n")
        self._process.stdin.flush()
        return self._answer()

    def end(self) -> dict[str, Any]:
        answer = self.ask("end")
        self._process.wait()
        return answer


def measure(row: str, peers: dict[str, Peer], rounds: int, seconds: float) -> dict[str, Any]:
    """Let the peers take turns at one row."""
    workers = {}
    for name, peer in peers.items():
        print(f"{row}: {name}", file=sys.stderr)
        workers[name] = Worker(peer, row)
    gemm = Worker(Peer("", "gemm_rows", "", sys.executable, ""), "gemm")
    steps = dict.fromkeys(workers, 1)
    for name, worker in workers.items():
        steps[name] = max(1, round(seconds / worker.ask("1")["seconds"]))
    times: dict[str, list[float]] = {name: [] for name in workers}
    rates = []
    for turn in range(rounds):
        for name in list(workers) if turn % 2 else list(workers)[::-1]:
            times[name].append(workers[name].ask(str(steps[name]))["seconds"])
        rates.append(gemm.built["flops"] / gemm.ask("5")["seconds"])
    gemm.end()
    peak = statistics.median(rates)
    found = {}
    for name, worker in workers.items():
        median = statistics.median(times[name])
        found[name] = {
            "family": peers[name].family,
            "ms": 1e3 * median,
            "ms_range": [1e3 * min(times[name]), 1e3 * max(times[name])],
            "share_of_matmul": worker.built["flops"] / median / peak,
            **{key: x for key, x in worker.built.items() if key != "flops"},
            **worker.end(),
        }
    return {"matmul_gflops": peak / 1e9, "flops": worker.built["flops"], "peers": found}


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """Return how much faster the best of fnml is than the best of PyTorch, and of JAX."""
    best: dict[str, float] = {}
    for peer in found["peers"].values():
        best[peer["family"]] = min(peer["ms"], best.get(peer["family"], peer["ms"]))
    if "fnml" not in best:
        return {}
    return {f"over_{name}": ms / best["fnml"] for name, ms in best.items() if name != "fnml"}


def table(row: str, found: dict[str, Any]) -> str:
    """Write one row's results as a Markdown table."""
    lines = [
        f"**{row}** (matrix product: {found['matmul_gflops']:.0f} GFLOP/s; "
        + ", ".join(f"{name.replace('_', ' ')}: {x:.2f}" for name, x in found["ratios"].items())
        + ")",
        "",
        "| | ms | range | share of the matrix product | peak MiB | first step, s | loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, peer in found["peers"].items():
        low, high = peer["ms_range"]
        lines.append(
            f"| {name} | {peer['ms']:.2f} | {low:.2f}-{high:.2f} | {peer['share_of_matmul']:.0%} | "
            f"{peer['peak_mib']:.0f} | {peer['first_step_s']:.1f} | {peer['loss']:.5f} |"
        )
    return "\n".join(lines)


def check(row: str, found: dict[str, Any]) -> None:
    """Refuse figures of peers that do not compute the same.

    Raises:
      SystemExit: two losses differ by more than 1e-4.
    """
    losses = {name: peer["loss"] for name, peer in found["peers"].items()}
    low, high = min(losses.values()), max(losses.values())
    if not high - low <= 1e-4 * abs(high):
        raise SystemExit(f"{row}: the losses differ by more than 1e-4: {losses}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--rows", default=",".join(ROWS), help="with commas between; all: %(default)s"
    )
    parser.add_argument("--peers", nargs="+", help="which peers by name; default: all of them")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each peer in each round")
    parser.add_argument("--json", type=Path, help="where to write all of it")
    options = parser.parse_args()
    peers = contestants()
    unknown = sorted({*(options.peers or ())} - {*peers})
    if unknown:
        parser.error(f"no peers {', '.join(unknown)}; there are {', '.join(peers)}")
    rows = options.rows.split(",")
    if not {*rows} <= {*ROWS}:
        parser.error(f"no rows {', '.join({*rows} - {*ROWS})}; there are {', '.join(ROWS)}")
    wanted = {name: peer for name, peer in peers.items() if name in (options.peers or peers)}
    for name, peer in wanted.items():
        if not peer.python:
            print(f"{name} is left out: {peer.named} names no Python with it", file=sys.stderr)
    wanted = {name: peer for name, peer in wanted.items() if peer.python}
    report: dict[str, Any] = {"machine": machine(), "rows": {}}
    for row in rows:
        peers = {name: peer for name, peer in wanted.items() if row in peer.rows}
        found = measure(row, peers, options.rounds, options.seconds)
        found["ratios"] = ratios(found)
        report["rows"][row] = found
        print(table(row, found), end="\n\n", flush=True)
        if options.json:
            options.json.write_text(json.dumps(report, indent=2) + "\n")
        check(row, found)


if __name__ == "__main__":
    main()
