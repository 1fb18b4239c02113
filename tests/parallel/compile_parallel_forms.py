"""Compile every parallel form for hardware that is not there, and print what it sends as JSON.

Run by ``test_parallel_forms.py`` (``elsewhere.run``): for a v5e 4x4 or for 8 H100. It needs no device.
"""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

TARGETS = {"tpu": "v5e:4x4", "cuda": "h100:1x8"}


def main(platform: str) -> None:
    from elsewhere import devices
    from parallel_forms import CASES

    chips = devices(TARGETS[platform])
    print(json.dumps([compile_one(name, build, chips, platform) for name, build in CASES]))


def compile_one(
    name: str, build: Callable[[Sequence[Any]], Any], chips: Sequence[Any], platform: str
) -> dict[str, Any]:
    """Compile one case; an error becomes its text, so that one run reports every case."""
    import jax

    from fnml.plan import collectives

    try:
        function, arguments = build(chips)
        traced = jax.jit(function).trace(*arguments)
        compiled = traced.lower(lowering_platforms=(platform,)).compile()
    except Exception as error:  # noqa: BLE001 - whatever the compiler says is the finding
        return {"case": name, "error": f"{type(error).__name__}: {error}"[:2000]}
    found = [[c.kind, c.count, c.bytes, c.group] for c in collectives(compiled.as_text())]
    return {"case": name, "devices": len(chips), "collectives": found}


if __name__ == "__main__":
    main(sys.argv[1])
