"""Recurrent layers: RNN, GRU, LSTM, each a scan over time per direction."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fnml.core import ConfigError, nearest
from fnml.interop.onnx._node import Node, Operator
from fnml.interop.onnx._static import traced, where_is

Activation = Callable[[Any], Any]

# An activation, and the default alpha and beta that it takes.
_ACTIVATIONS: Mapping[str, tuple[Callable[..., Any], tuple[float, ...]]] = {
    "affine": (lambda x, a, b: a * x + b, (1.0, 0.0)),
    "elu": (lambda x, a: jnp.where(x > 0, x, a * jnp.expm1(jnp.minimum(x, 0))), (1.0,)),
    "hardsigmoid": (lambda x, a, b: jnp.clip(a * x + b, 0, 1), (0.2, 0.5)),
    "leakyrelu": (lambda x, a: jnp.where(x >= 0, x, a * x), (0.01,)),
    "relu": (jax.nn.relu, ()),
    "scaledtanh": (lambda x, a, b: a * jnp.tanh(b * x), (1.0, 1.0)),
    "sigmoid": (jax.nn.sigmoid, ()),
    "softplus": (jax.nn.softplus, ()),
    "softsign": (jax.nn.soft_sign, ()),
    "tanh": (jnp.tanh, ()),
    "thresholdedrelu": (lambda x, a: jnp.where(x > a, x, 0), (1.0,)),
}


class _Weights(NamedTuple):
    """One direction's arrays; K gates of H units.

    Attributes:
      inputs: ``[K*H, I]``.
      recurrent: ``[K*H, H]``.
      input_bias: ``[1, K*H]``.
      recurrent_bias: ``[1, K*H]``.
      peepholes: ``[1, 3*H]`` (input, output, forget); zeros where absent.
    """

    inputs: Any
    recurrent: Any
    input_bias: Any
    recurrent_bias: Any
    peepholes: Any


Carry = tuple[Any, ...]
Cell = Callable[[Node, list[Activation], _Weights, Carry, Any], Carry]


def _activations(node: Node, default: tuple[str, ...], directions: int) -> list[Activation]:
    """Bind the node's activations, which consume ``activation_alpha`` and ``_beta`` in order."""
    given = node.attributes
    names = given.get("activations") or list(default) * directions
    alphas, betas = (iter(given.get(f"activation_{k}") or ()) for k in ("alpha", "beta"))
    if len(names) != len(default) * directions:
        raise ConfigError(
            f"{where_is(node)}: {len(names)} activations, expected {len(default)} for each of "
            f"{directions} directions"
        )
    return [_bind(node, name, alphas, betas) for name in names]


def _bind(node: Node, name: str, alphas: Iterator[float], betas: Iterator[float]) -> Activation:
    if name.lower() not in _ACTIVATIONS:
        raise ConfigError(
            f"{where_is(node)}: no activation {name!r}.{nearest(name.lower(), _ACTIVATIONS)}"
        )
    function, defaults = _ACTIVATIONS[name.lower()]
    sources = (alphas, betas)[: len(defaults)]
    values = [next(source, default) for source, default in zip(sources, defaults, strict=True)]
    return lambda x: function(x, *values)


def _clip(node: Node, x: Any) -> Any:
    limit = node.attributes.get("clip")
    return x if limit is None else jnp.clip(x, -limit, limit)


def _rnn_cell(node: Node, act: list[Activation], w: _Weights, carry: Carry, x: Any) -> Carry:
    (hidden,) = carry
    return (act[0](_clip(node, x + hidden @ w.recurrent.T + w.recurrent_bias)),)


def _gru_cell(node: Node, act: list[Activation], w: _Weights, carry: Carry, x: Any) -> Carry:
    (hidden,) = carry
    units = hidden.shape[-1]
    gates_w, last_w = w.recurrent[: 2 * units], w.recurrent[2 * units :]
    gates_b, last_b = w.recurrent_bias[:, : 2 * units], w.recurrent_bias[:, 2 * units :]
    gates = act[0](_clip(node, x[:, : 2 * units] + hidden @ gates_w.T + gates_b))
    update, reset = jnp.split(gates, 2, axis=-1)
    if node.attributes.get("linear_before_reset", 0):
        inner = reset * (hidden @ last_w.T + last_b)
    else:
        inner = (reset * hidden) @ last_w.T + last_b
    candidate = act[1](_clip(node, x[:, 2 * units :] + inner))
    return ((1 - update) * candidate + update * hidden,)


def _lstm_cell(node: Node, act: list[Activation], w: _Weights, carry: Carry, x: Any) -> Carry:
    hidden, cell = carry
    gates = x + hidden @ w.recurrent.T + w.recurrent_bias
    i, o, f, c = jnp.split(gates, 4, axis=-1)
    peep_i, peep_o, peep_f = jnp.split(w.peepholes, 3, axis=-1)
    i = act[0](_clip(node, i + peep_i * cell))
    coupled = node.attributes.get("input_forget", 0)
    f = 1 - i if coupled else act[0](_clip(node, f + peep_f * cell))
    cell = f * cell + i * act[1](_clip(node, c))
    o = act[0](_clip(node, o + peep_o * cell))
    return o * act[2](cell), cell


def _run(
    node: Node,
    step: Cell,
    act: list[Activation],
    w: _Weights,
    x: Any,
    lengths: Any,
    start: Carry,
    reverse: bool,
) -> tuple[Any, Carry]:
    """Scan one direction over ``x [T, B, I]``; past a sequence's end the state rests."""
    # One large product for all times; only the recurrent one has to stay inside the scan.
    projected = x @ w.inputs.T + w.input_bias[None]

    def body(carry: Carry, inputs: tuple[Any, Any]) -> tuple[Carry, Any]:
        time, row = inputs
        new = step(node, act, w, carry, row)
        if lengths is None:
            return new, new[0]
        alive = (time < lengths)[:, None]
        kept = tuple(jnp.where(alive, n, o) for n, o in zip(new, carry, strict=True))
        return kept, jnp.where(alive, new[0], 0)

    times = jnp.arange(x.shape[0], dtype=jnp.int32)
    last, outputs = lax.scan(body, start, (times, projected), reverse=reverse)
    return outputs, last


def _layer(step: Cell, gates: int, default: tuple[str, ...], states: int) -> Operator:
    """Make the operator of a cell: its gates, default activations and number of states."""

    def operator(
        node: Node,
        x: Any,
        w: Any,
        r: Any,
        b: Any = None,
        lengths: Any = None,
        hidden: Any = None,
        cell: Any = None,
        peepholes: Any = None,
    ) -> tuple[Any, ...]:
        x, w, r, b, lengths, *rest = traced(node, x, w, r, b, lengths, hidden, cell, peepholes)
        *initial, peepholes = rest
        batch_first = bool(node.attributes.get("layout", 0))
        if batch_first:
            x = jnp.swapaxes(x, 0, 1)
            initial = [None if s is None else jnp.swapaxes(s, 0, 1) for s in initial]
        directions, units = r.shape[0], r.shape[-1]
        shape = (directions, x.shape[1], units)
        initial = [jnp.zeros(shape, x.dtype) if s is None else s for s in initial[:states]]
        if b is None:
            b = jnp.zeros((directions, 2 * gates * units), x.dtype)
        if peepholes is None:
            peepholes = jnp.zeros((directions, 3 * units), x.dtype)
        act = _activations(node, default, directions)
        each = len(default)
        biases = [jnp.split(rows[None], 2, axis=1) for rows in b]
        results = [
            _run(
                node,
                step,
                act[d * each : (d + 1) * each],
                _Weights(w[d], r[d], biases[d][0], biases[d][1], peepholes[d][None]),
                x,
                lengths,
                tuple(s[d] for s in initial),
                reverse=d == 1 or node.attributes.get("direction", "forward") == "reverse",
            )
            for d in range(directions)
        ]
        every = jnp.stack([outputs for outputs, _ in results], axis=1)
        last = [jnp.stack(s) for s in zip(*(carry for _, carry in results), strict=True)]
        if batch_first:
            every = every.transpose(2, 0, 1, 3)
            last = [jnp.swapaxes(s, 0, 1) for s in last]
        return every, *last

    return operator


OPERATORS: Mapping[str, Operator] = {
    "GRU": _layer(_gru_cell, 3, ("Sigmoid", "Tanh"), 1),
    "LSTM": _layer(_lstm_cell, 4, ("Sigmoid", "Tanh", "Tanh"), 2),
    "RNN": _layer(_rnn_cell, 1, ("Tanh",), 1),
}
