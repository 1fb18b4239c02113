"""The least time that a step can take on its target."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from fnml.plan._collectives import Collective, wire_bytes
from fnml.plan._targets import Target
from fnml.plan._traffic import Work


class Roofline(NamedTuple):
    """Seconds per step that each part of a chip needs at its published speed.

    Attributes:
      compute: matrix products.
      memory: reading from and writing to main memory.
      links: sending to other chips over ICI or NVLink.
      network: sending to other hosts, where links end at the host.

    Source: Williams, Waterman and Patterson 2009, doi:10.1145/1498765.1498785.
    """

    compute: float
    memory: float
    links: float
    network: float

    @property
    def seconds(self) -> float:
        """The least time of a step: as if everything overlapped with everything."""
        return max(self)

    @property
    def bound(self) -> str:
        """What takes longest."""
        return self._fields[self.index(self.seconds)]


def roofline(
    target: Target, work: Work, collectives: Sequence[Collective], places: Sequence[Sequence[int]]
) -> Roofline:
    """Return what each part of a chip needs for its share of a step."""
    chip = target.chip
    narrow = ("bf16", "f16", "s8", "u8", "f8e4m3fn", "f8e5m2")
    compute = sum(
        count / (chip.bf16 if dtype in narrow else chip.f32) for dtype, count in work.flops.items()
    )
    links = network = 0.0
    for collective in collectives:
        near, far = _seconds(target, collective, places)
        links, network = links + near, network + far
    return Roofline(compute, work.bytes / chip.bandwidth, links, network)


def _seconds(
    target: Target, collective: Collective, places: Sequence[Sequence[int]]
) -> tuple[float, float]:
    """Return the seconds of a collective on a chip's links, and on its host's network."""
    chip, sent = target.chip, wire_bytes(collective)
    where = [places[i] for i in collective.members if i < len(places)]
    if chip.dimensions:
        # A ring uses the links of those dimensions of the torus that its members differ in.
        used = sum(len({p[d] for p in where}) > 1 for d in range(chip.dimensions))
        return sent / (chip.links * max(used, 1) / chip.dimensions), 0.0
    hosts = len({p[0] for p in where})
    if math.isinf(chip.network) or hosts < 2:
        return sent / chip.links, 0.0
    # Each host hands over its part once: its GPUs share that among their adapters.
    local = max(collective.group // hosts, 1)
    between = collective.bytes * (hosts - 1) / hosts / local
    between *= 2 if collective.kind == "all-reduce" else 1
    return (sent / chip.links if local > 1 else 0.0), between / chip.network
