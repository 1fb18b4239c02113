"""``fnml check grad|loss MODULE:FUNCTION``."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from fnml.cli._example import load_example
from fnml.cli._findings import report
from fnml.core import nearest
from fnml.laws import check_grad, check_loss

_USAGE = """usage: fnml check WHAT ...

  grad      a loss's gradient, against finite differences in float64
  loss      the usual faults: NaN and where it began, a wrong gradient, overflow in float16,
            dead parameters, exploding activations, unused batch fields, [B] against [B, 1],
            key reuse, dtypes, baked-in constants, a weight that is not the mean's

'fnml check WHAT --help' shows its options."""


@dataclass(frozen=True)
class CheckGrad:
    """Check your loss's gradient against finite differences in float64, parameter by parameter.

    The module also defines example(), which returns (params, batch) or (params, batch, key). The
    exit code is 1 if a gradient is wrong.
    """

    loss: tyro.conf.Positional[str]
    """The loss, as my_module:loss_fn; called as loss_fn(params, batch, key)."""
    example: str = "example"
    """The module's function that returns the example."""
    directions: int = 6
    """Random directions to try for each parameter."""
    coordinates: int = 4
    """Largest, and random, coordinates to try for each parameter."""
    seed: int = 0
    """Draws directions and coordinates."""


@dataclass(frozen=True)
class CheckLoss:
    """Look for the usual faults in your loss, and name each with its place.

    The module also defines example(), which returns (params, batch) or (params, batch, key). The
    exit code is 1 if a fault is found.
    """

    loss: tyro.conf.Positional[str]
    """The loss, as my_module:loss_fn; called as loss_fn(params, batch, key)."""
    example: str = "example"
    """The module's function that returns the example."""
    allow: tuple[str, ...] = ()
    """Faults that are meant to be there, such as: --allow broadcast "batch field"."""


def command(arguments: Sequence[str]) -> int:
    """Print a table of findings; return 1 if something is wrong."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE)
        return 0
    what, *rest = arguments
    if what == "loss":
        wanted = tyro.cli(CheckLoss, args=rest, prog="fnml check loss")
        example = load_example(wanted.loss, wanted.example)
        return report(check_loss(*example, allow=wanted.allow), "fault")
    if what != "grad":
        hint = nearest(what, ["grad", "loss"])
        print(f"fnml check: cannot check {what!r}.{hint}\n\n{_USAGE}", file=sys.stderr)
        return 2
    parsed = tyro.cli(CheckGrad, args=rest, prog="fnml check grad")
    findings = check_grad(
        *load_example(parsed.loss, parsed.example),
        directions=parsed.directions,
        coordinates=parsed.coordinates,
        seed=parsed.seed,
    )
    return report(findings, "parameter")
