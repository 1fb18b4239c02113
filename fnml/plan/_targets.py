"""The hardware that can be planned for: what its makers say of it."""

import math
import os
import re
from dataclasses import dataclass
from typing import Literal

from fnml.core import ConfigError, nearest

Platform = Literal["tpu", "cuda", "cpu"]
GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """What one chip has.

    Attributes:
      name: as in a target.
      platform: the compiler it takes.
      memory: bytes of main memory that a program gets.
      bf16: FLOP/s of matrix products on bfloat16.
      f32: FLOP/s of matrix products on float32, with the precision that JAX uses by default.
      bandwidth: bytes per second from and to main memory.
      links: bytes per second that a chip sends over all of its links to neighbours (ICI, NVLink).
      network: bytes per second that a chip sends to another host, where links end at the host.
      dimensions: of the torus that the links make; 0 for all to all.
      compiler: what the compiler is told of it, where it knows no chip by name.
      source: where the figures are from.
    """

    name: str
    platform: Platform
    memory: int
    bf16: float
    f32: float
    bandwidth: float
    links: float
    network: float
    dimensions: int
    source: str
    compiler: str = ""


@dataclass(frozen=True)
class Target:
    """Chips in an arrangement, such as ``v5e:4x4``.

    Attributes:
      chip: what one of them has.
      shape: how they are arranged: a torus for TPUs, (hosts, GPUs of each) for NVIDIA.
    """

    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """How many there are."""
        return math.prod(self.shape)

    @property
    def name(self) -> str:
        """The target as it is written on a command line."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


_TPU = "cloud.google.com/tpu/docs, system architecture; memory as its compiler states it"
_GPU = (
    "NVIDIA's data sheet, dense; float32 as TF32; memory: the 75% that JAX takes by default; "
    "network: one 400 Gbit/s adapter per GPU"
)
# The registers, threads and shared memory of a Hopper, as the compiler's own description has it.
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 minor: 0 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "NVIDIA {name}"
"""


def _tpu(
    name: str, gib: float, flops: float, bandwidth: float, links: float, dimensions: int
) -> Chip:
    memory = int(gib * GIB)
    return Chip(name, "tpu", memory, flops, flops, bandwidth, links, math.inf, dimensions, _TPU)


def _hopper(name: str, memory: int, bandwidth: float) -> Chip:
    told = _HOPPER.format(name=name.upper(), memory=memory, bandwidth=int(bandwidth))
    usable = memory * 3 // 4
    return Chip(name, "cuda", usable, 989e12, 494e12, bandwidth, 450e9, 50e9, 0, _GPU, told)


CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v5e", 15.75, 197e12, 819e9, 200e9, 2),
        _tpu("v5p", 95.74, 459e12, 2765e9, 600e9, 3),
        _tpu("v6e", 31.25, 918e12, 1640e9, 448e9, 2),
        _hopper("h100", 85_520_809_984, 3.35e12),
        _hopper("h200", 150_754_820_096, 4.8e12),
    )
}
"""The chips by name, beside ``cpu``."""


def _cpu(devices: int) -> Chip:
    """Describe one of ``devices`` parts of a CPU: it shares memory and time with the others."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // devices
    return Chip(
        *("cpu", "cpu", memory, 400e9 / devices, 430e9 / devices, 40e9 / devices),
        *(40e9 / devices, math.inf, 0),
        "products and copies as JAX runs them on two cores of an AVX-512 server; this one's memory",
    )


def parse_target(text: str) -> Target:
    """Read a target: ``v5e:4x4``, ``v5p:4x4x4``, ``h100:8x8`` (hosts x GPUs), ``cpu`` or ``cpu:8``.

    Raises:
      ConfigError: the chip is unknown, or such an arrangement of it.

    >>> target = parse_target("v5e:4x4")
    >>> target.chips, target.name
    (16, 'v5e:4x4')
    >>> parse_target("cpu").chips
    1
    """
    name, _, shape = text.strip().partition(":")
    sizes = tuple(int(n) for n in shape.split("x")) if re.fullmatch(r"\d+(x\d+)*", shape) else ()
    if name == "cpu":
        if (shape and len(sizes) != 1) or 0 in sizes:
            raise ConfigError(f"target={text!r}: expected cpu, or cpu:8 for a CPU divided by 8")
        sizes = sizes or (1,)
        return Target(_cpu(sizes[0]), sizes)
    if name not in CHIPS:
        known = (*CHIPS, "cpu")
        raise ConfigError(
            f"target={text!r}: there is no chip {name!r}.{nearest(name, known)} Known: "
            f"{', '.join(known)}, as in v5e:4x4"
        )
    chip = CHIPS[name]
    dimensions = chip.dimensions or 2
    if len(sizes) != dimensions or 0 in sizes:
        form = "hosts x GPUs of each" if chip.platform == "cuda" else "the sizes of its torus"
        raise ConfigError(
            f"target={text!r}: expected {dimensions} sizes, {form}, such as "
            f"{name}:{'x'.join(['4'] * dimensions)}"
        )
    if chip.platform == "cuda" and sizes[1] > 8:
        raise ConfigError(f"target={text!r}: a host has at most 8 GPUs, as in {name}:8x8")
    return Target(chip, sizes)
