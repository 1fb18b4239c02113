"""Say how a run ended, and turn it into an exit code."""

import sys

from fnml.recipes import Finished


def report(finished: Finished) -> int:
    """Print the result's main lines, once for a run; return 0, or 143 if SIGTERM stopped it."""
    result, directory = finished.result, finished.directory
    stopped = 143 if finished.signal == "SIGTERM" else 0
    if not finished.first:
        return stopped
    values = {**{f"train {k}": v for k, v in result["train"].items()}}
    values |= {f"held-out {k}": v for k, v in result["eval"].items()}
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    if finished.signal is not None:
        print(
            f"stopped by {finished.signal} after step {result['step']}; a checkpoint is saved. "
            f"Continue with: fnml resume {directory}"
        )
        return stopped
    if result["stopped"]:
        print(f"stopped early: {result['stopped']}", file=sys.stderr)
    memory = f"at most {result['peak_memory'] / (1 << 20):.0f} MiB of memory"
    print(f"{directory}: {result['step']} steps in {result['seconds']:.1f} s, {memory}, {metrics}")
    print(f"params_sha256 {result['params_sha256']}")
    return 0
