"""Which of the branches that a program offers by platform would run."""

from typing import Any

from jax.extend import backend
from jax.extend import core as jex_core

from fnml.core import ConfigError, nearest

_KNOWN = ("cpu", "cuda", "rocm", "tpu", "other")
# Kernels that state no cost: Mosaic GPU's, and foreign functions.
_SILENT = frozenset(("core_map", "mpmd_map", "ffi_call"))


def chosen_platform(name: str | None) -> str:
    """Return a platform's name as ``lax.platform_dependent`` has it; by default, that at hand.

    Raises:
      ConfigError: there is no such platform.

    >>> chosen_platform("tpu")
    'tpu'
    """
    if name is None:
        device = backend.get_default_device()
        if device.platform != "gpu":
            return device.platform
        return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"
    if name not in _KNOWN:
        raise ConfigError(
            f"platform={name!r}: expected one of {', '.join(map(repr, _KNOWN))}"
            f".{nearest(name, _KNOWN)}"
        )
    return name


def possible(eqn: Any, branches: list[Any], platform: str) -> list[Any]:
    """Return the branches of a ``cond`` that could run on a platform.

    Of branches by platform that is the platform's own, or else the default; or that also where
    the own one holds a kernel that does not state what it computes, as both compute the same.
    Where there is none for this platform, and of a ``cond`` on a value, that is every branch.
    """
    platforms = eqn.params.get("branches_platforms")
    if platforms is None:
        return branches
    own = [b for b, names in zip(branches, platforms, strict=True) if platform in (names or ())]
    default = [b for b, names in zip(branches, platforms, strict=True) if names is None]
    if own and not (default and _silent(own[0].jaxpr)):
        return own
    return default or branches


def _silent(jaxpr: Any) -> bool:
    """Tell whether a jaxpr holds a kernel that does not say what it costs."""
    return any(
        eqn.primitive.name in _SILENT
        or (eqn.primitive.name == "pallas_call" and eqn.params.get("cost_estimate") is None)
        or any(map(_silent, jex_core.jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )
