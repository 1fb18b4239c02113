"""Compile every mapped form's gradient for devices that are not there; print what it sends as JSON.

Run by ``test_compiled_mapped_forms.py`` (``elsewhere.run``): for v5e:4x4, or one host of eight H100.
"""

import json
import re
import sys
import time
from typing import Any


def main(platform: str, names: list[str]) -> None:
    from compile_parallel_forms import TARGETS
    from elsewhere import devices
    from mapped_forms import FORMS

    found = devices(TARGETS[platform])
    names = names or [name for name, form in FORMS.items() if form.compiled]
    print(json.dumps({name: compile_one(FORMS[name], found, platform) for name in names}))


def compile_one(form: Any, devices: list[Any], platform: str) -> dict[str, Any]:
    """Compile one form; an error becomes its text, so that one run reports every form."""
    import jax
    from mapped_forms import LONG, SHORT, divided

    from fnml.core import abstract

    config = LONG if form.kernel else SHORT
    model, run, (params, tokens) = divided(form, config, devices)
    shapes = jax.tree.map(
        lambda x, lies: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies),
        (abstract(model.spec), jax.ShapeDtypeStruct((16, config.context), "int32")),
        (params, tokens),
    )
    began = time.monotonic()
    try:
        text = jax.jit(run).trace(*shapes).lower(lowering_platforms=(platform,)).compile().as_text()
    except Exception as error:  # noqa: BLE001 - whatever the compiler says is the finding
        return {"error": f"{type(error).__name__}: {error}"[:2000]}
    kinds = re.findall(
        r"= .*? (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(",
        text,
    )
    kernels = re.findall(r"custom_call_target=\"(?:tpu_custom_call|mosaic)", text)
    seconds = round(time.monotonic() - began, 1)
    return {"sends": sorted(set(kinds)), "kernels": len(kernels), "seconds": seconds}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
