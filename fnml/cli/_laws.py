"""``fnml laws MODULE:FUNCTION``."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import tyro

from fnml.cli._example import load_example
from fnml.cli._findings import report
from fnml.laws import check_laws


@dataclass(frozen=True)
class Laws:
    """Check the laws of the transforms on your own loss.

    The module also defines example(), which returns (params, batch) or (params, batch, key). The
    exit code is 1 if a law is broken.
    """

    loss: tyro.conf.Positional[str]
    """The loss, as my_module:loss_fn; called as loss_fn(params, batch, key)."""
    example: str = "example"
    """The module's function that returns the example."""
    devices: int = 4
    """How many CPU devices to divide the batch over."""


def command(arguments: Sequence[str]) -> int:
    """Print a table of laws; return 1 if one is broken."""
    parsed = tyro.cli(Laws, args=arguments, prog="fnml laws")
    # Once JAX has started, its devices are what they are.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", parsed.devices)
    example = load_example(parsed.loss, parsed.example)
    return report(check_laws(*example), "law")
