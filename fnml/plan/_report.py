"""Print a plan."""

from typing import Any

from fnml.plan._plan import Plan

_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def as_bytes(size: float) -> str:
    """Write bytes for people to read.

    >>> as_bytes(3 * 2**29), as_bytes(5000)
    ('1.5 GiB', '4.88 KiB')
    """
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.3g} {unit}" if size < 100 else f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.3g} GiB" if size < 100 else f"{size:,.0f} GiB"


def amount(value: float) -> str:
    """Write a count with an SI prefix.

    >>> amount(2.5e15)
    '2.5 P'
    """
    index = 0
    while abs(value) >= 1000 and index < len(_PREFIXES) - 1:
        value, index = value / 1000, index + 1
    return f"{value:.3g} {_PREFIXES[index]}"


def as_seconds(value: float) -> str:
    """Write a time for people to read.

    >>> as_seconds(0.0123), as_seconds(2.0)
    ('12.3 ms', '2 s')
    """
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def table(plan: Plan) -> Any:
    """Return a ``rich`` table of a plan."""
    from rich.table import Table

    memory, limit = plan.memory, plan.limit
    mesh = ", ".join(f"{name}={size}" for name, size in plan.mesh.items())
    title = f"{plan.target.name}: {plan.target.chips} chips, {mesh}"
    shown = Table("on each chip", "", "", title=title, title_justify="left")

    def size(name: str, value: int, note: str = "") -> None:
        shown.add_row(name, as_bytes(value), note or f"{value / limit:.1%}")

    size("parameters", memory.parameters)
    size("optimizer state", memory.optimizer)
    if memory.model_state:
        size("model state", memory.model_state)
    size("batch, step and key", memory.batch)
    named = memory.parameters + memory.optimizer + memory.model_state + memory.batch
    if memory.arguments > named:
        size("padding of those", memory.arguments - named)
    if not plan.refused:
        size("activations kept for backward", memory.activations)
    size("other temporaries", memory.temporaries)
    if memory.outputs > memory.aliased:
        size("results in new places", memory.outputs - memory.aliased)
    if memory.code:
        size("the program", memory.code)
    verdict = (
        "fits"
        if plan.fits
        else f"does not fit: {as_bytes(plan.missing)} too much"
        + (" at least" if plan.refused else "")
    )
    shown.add_row(
        "memory", as_bytes(memory.total), f"of {as_bytes(limit)}: {verdict}", end_section=True
    )
    if plan.refused:
        shown.caption = f"the compiler says: {plan.refused}"
        return shown
    times = plan.roofline
    shown.add_row("FLOPs", amount(plan.flops), as_seconds(times.compute))
    shown.add_row("bytes to and from memory", as_bytes(plan.bytes), as_seconds(times.memory))
    for found in plan.collectives:
        axes = along(plan, found.members)
        what = f"{found.kind} x {found.count:,} of {found.group} ({axes})"
        shown.add_row(what, as_bytes(found.bytes), "")
    if plan.collectives:
        far = f", network {as_seconds(times.network)}" if times.network else ""
        shown.add_row("collectives", "", f"links {as_seconds(times.links)}{far}")
    shown.add_row(
        "step at best", as_seconds(plan.seconds), f"bound by {times.bound}", end_section=True
    )
    shown.add_row("model FLOPs, all chips", amount(plan.model_flops), "")
    shown.add_row("utilisation at most", f"{plan.utilisation:.1%}", "of the peak in bfloat16")
    notes = [f"compiled in {plan.compile_seconds:.0f} s"]
    if plan.kernels:
        notes.append(f"{plan.kernels} calls of hand-written kernels a step")
    if plan.unbounded:
        notes.append(f"{plan.unbounded} loops of unknown length count as one turn")
    shown.caption = "; ".join(notes)
    return shown


def along(plan: Plan, members: tuple[int, ...]) -> str:
    """Name the mesh axes that a group of devices lies along.

    A group that lies along parts of axes only is named by all of them.
    """
    places = []
    for member in members:
        place = []
        for size in reversed(list(plan.mesh.values())):
            member, at = divmod(member, size)
            place.append(at)
        places.append(place[::-1])
    axes = [name for i, name in enumerate(plan.mesh) if len({place[i] for place in places}) > 1]
    return ", ".join(axes) or "one device"
