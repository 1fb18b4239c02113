"""Sets of rules: which mesh axis shards which logical axis of the zoo's parameters."""

from types import MappingProxyType

from fnml.core import ConfigError, LayoutError, Rules, axis_tuple, nearest

DATA: Rules = MappingProxyType({})
"""Every device holds all parameters; only the batch is divided."""

FSDP: Rules = MappingProxyType({"embed": "data"})
"""Every parameter that has the model's width is divided along ``data`` (ZeRO-3): a device gathers
a layer's parameters when it computes them, and keeps its part of gradients and optimizer state."""

TENSOR: Rules = MappingProxyType(
    {"heads": "model", "kv_heads": "model", "mlp": "model", "vocab": "model"}
)
"""Attention by heads, feed-forward layers by hidden unit, embedding and head by token, along
``model``: two all-reduces of the activations per layer in each direction.

Source: Shoeybi et al. 2019, arXiv:1909.08053, section 3.
"""

EXPERT: Rules = MappingProxyType({"experts": "expert"})
"""Each device along ``expert`` holds some of the experts."""

_SETS = {"data": DATA, "fsdp": FSDP, "tensor": TENSOR, "expert": EXPERT}


def combine(*sets: Rules) -> Rules:
    """Join sets of rules into one.

    A logical axis that several sets shard along the same mesh axes is no conflict. One parameter may
    be sharded along several of its dimensions, by a different mesh axis each
    (:func:`fnml.core.shardings` refuses the same one twice).

    Raises:
      LayoutError: two sets shard a logical axis differently; all of them are named.

    >>> dict(combine(FSDP, {"mlp": "model"}))
    {'embed': 'data', 'mlp': 'model'}
    """
    joined: dict[str, tuple[str, ...]] = {}
    faults = []
    for rules in sets:
        for name, rule in rules.items():
            axes = axis_tuple(rule)
            if joined.setdefault(name, axes) != axes:
                faults.append(f"{name!r} is sharded along {joined[name]} and along {axes}")
    if faults:
        raise LayoutError(
            "these rules do not go together: "
            + "; ".join(faults)
            + ". Name both mesh axes in one rule, such as {'embed': ('data', 'model')}, or leave one out"
        )
    return MappingProxyType(
        {name: axes[0] if len(axes) == 1 else axes or None for name, axes in joined.items()}
    )


def parse_rules(text: str) -> Rules:
    """Read sets of rules joined by ``+``, as written in a configuration or on a command line.

    Raises:
      ConfigError: a set is unknown.

    >>> dict(parse_rules("fsdp+expert"))
    {'embed': 'data', 'experts': 'expert'}
    """
    names = [part.strip() for part in text.split("+")] if text.strip() else []
    faults = [f"{name!r}.{nearest(name, _SETS)}" for name in names if name not in _SETS]
    if faults:
        raise ConfigError(
            f"rules={text!r}: no such set: {'; '.join(faults)} Expected {', '.join(_SETS)}, "
            "joined by +, such as fsdp+tensor"
        )
    return combine(*(_SETS[name] for name in names))
