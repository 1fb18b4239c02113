"""How a run goes on with fewer processes than it began with."""

from typing import NamedTuple


class Size(NamedTuple):
    """How many processes, and how many devices they have together."""

    processes: int
    devices: int


def shrink(size: Size, shards: int, available: int, least: int) -> Size | None:
    """Return the largest size that a run of ``size`` can go on with.

    Each process keeps at most the devices it had. One device has all of the logical shards; several
    share them evenly, a power of two each, and processes share the devices evenly: so the bits stay
    the same.

    Args:
      size: what the run began with.
      shards: the logical shards of a batch (``--accumulate``).
      available: how many processes there can be.
      least: with how many it makes sense.

    Returns:
      ``None`` if there is no such size.

    >>> shrink(Size(4, 8), 8, available=3, least=1)
    Size(processes=2, devices=4)
    """
    each = size.devices // size.processes
    fitting = (
        Size(processes, devices)
        for processes in range(min(available, size.processes), least - 1, -1)
        for devices in range(processes * each, processes - 1, -1)
        if devices % processes == 0 and _shares(devices, shards)
    )
    return next(fitting, None)


def _shares(devices: int, shards: int) -> bool:
    each, rest = divmod(shards, devices)
    return devices == 1 or (not rest and each & (each - 1) == 0)
