"""Compiler parameters, always explicit: the default backend of ``pallas_call`` changes by version."""

from typing import Any, Literal

import jax

TPU_VMEM = {"v5e": 16 << 20, "v6e": 32 << 20}
"""Bytes of vector memory that a TPU kernel may use by default."""

CUDA_SMEM = {"H100": 232_448, "H200": 232_448}
"""Bytes of shared memory that one block of threads may use."""


def tpu_params(*semantics: Literal["parallel", "arbitrary"]) -> Any:
    """Return Mosaic's parameters for TPUs: one word per grid dimension.

    ``"parallel"`` where the order does not matter, ``"arbitrary"`` where it does (a dimension
    that accumulates into one output block, or carries scratch from step to step).
    """
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.CompilerParams(dimension_semantics=semantics)


def cuda_params(*, fast: bool = True, warpgroup: bool = False) -> Any:
    """Return Mosaic GPU's parameters: ``fast`` allows approximate exp2, ``warpgroup`` its dialect."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    semantics = plgpu.LoweringSemantics.Warpgroup if warpgroup else plgpu.LoweringSemantics.Lane
    return plgpu.CompilerParams(approx_math=fast, lowering_semantics=semantics)


def hopper_faults() -> list[str]:
    """Say why kernels written for Hopper cannot run on the GPUs at hand; nothing if there are none.

    A program lowered on a machine without a GPU is taken to be for a Hopper.
    """
    if jax.default_backend() != "gpu":
        return []
    found = {str(getattr(device, "compute_capability", "?")) for device in jax.local_devices()}
    return [f"compute capability {x} (it takes 9.0)" for x in sorted(found - {"9.0"})]
