"""The rows of the comparison: weights, batches and FLOPs, the same for every framework.

Nothing but NumPy, so that every peer's environment can read it. Weights are nested dicts; layers
lie stacked along a leading axis, kernels are [inputs, outputs], convolutions HWIO.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np


class AdamW(NamedTuple):
    """The optimizer of a row, on every parameter; eps is added after the bias correction.

    ``b2`` is 0.95 and not 0.999, since libraries that correct the bias in float32 (Optax, Keras) take
    1 - 0.999 for 1.3e-5 more or less than it is, those that do it in float64 (PyTorch) do not, and
    after 50 steps of ``cnn`` their losses are 1.4e-4 apart. 1 - 0.95 is exact to 5e-7.
    """

    learning_rate: float = 1e-3
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.01


_SMOOTH = AdamW(learning_rate=2e-6, eps=1e-4, weight_decay=50.0)
"""For rows of many steps in which rounding grows.

With ``eps`` = 1e-8, AdamW turns the rounding of a gradient that is almost zero into a whole step, and
with rates from 1e-4 on each step of a ReLU network with pooling or BatchNorm makes what rounding left
larger; at 2e-6 it does not. The weights still decay by 1e-4 of themselves in each step.
"""


class Problem(NamedTuple):
    """One row.

    Attributes:
      config: the sizes.
      weights: the initial parameters.
      batches: what the steps take turns with: tuples of arrays.
      flops: of the matrix products and convolutions in one step, forward and backward.
      checked: after how many steps the losses are compared.
      adamw: the optimizer's settings.
    """

    config: dict[str, Any]
    weights: dict[str, Any]
    batches: list[tuple[np.ndarray, ...]]
    flops: float
    checked: int = 50
    adamw: AdamW = AdamW()


def _normal(rng: np.random.Generator, std: float, *shape: int) -> np.ndarray:
    return (std * rng.standard_normal(shape)).astype(np.float32)


def _text(rng: np.random.Generator, vocab: int, shape: tuple[int, int]) -> np.ndarray:
    """Draw tokens that are no noise: each is one of four that may follow the one before."""
    follows = np.random.default_rng(1).integers(0, vocab, (vocab, 4))
    tokens = np.empty(shape, np.int32)
    tokens[:, 0] = rng.integers(0, vocab, shape[0])
    for t in range(1, shape[1]):
        tokens[:, t] = follows[tokens[:, t - 1], rng.integers(0, 4, shape[0])]
    return tokens


def _gpt(width: int, layers: int, T: int, B: int) -> Problem:
    """A GPT of RMSNorm, rotary positions, causal attention and SwiGLU, without biases.

    Its batches are (tokens, targets), both [B, T].
    """
    V, H, L, D = 256, 4, layers, width
    M = -(-D * 8 // 96) * 32
    rng = np.random.default_rng(0)
    branch = (2 * L) ** -0.5
    weights = {
        "embed": {"table": _normal(rng, 0.02, V, D)},
        "layers": {
            "attention_norm": {"scale": np.ones((L, D), np.float32)},
            "attention": {
                "query": _normal(rng, D**-0.5, L, D, D),
                "key": _normal(rng, D**-0.5, L, D, D),
                "value": _normal(rng, D**-0.5, L, D, D),
                "out": _normal(rng, branch * D**-0.5, L, D, D),
            },
            "mlp_norm": {"scale": np.ones((L, D), np.float32)},
            "mlp": {
                "gate": _normal(rng, D**-0.5, L, D, M),
                "up": _normal(rng, D**-0.5, L, D, M),
                "down": _normal(rng, branch * M**-0.5, L, M, D),
            },
        },
        "norm": {"scale": np.ones(D, np.float32)},
        "head": {"kernel": _normal(rng, 0.02, D, V)},
    }
    texts = [_text(rng, V, (B, T + 1)) for _ in range(8)]
    batches = [(np.ascontiguousarray(t[:, :-1]), np.ascontiguousarray(t[:, 1:])) for t in texts]
    config = {"vocab": V, "width": D, "layers": L, "heads": H, "mlp_width": M, "context": T}
    products = L * (4 * D * D + 3 * D * M) + D * V
    # Two products of D numbers for each pair of a query and a key that it may see.
    pairs = L * 2 * D * (T + 1) / 2
    return Problem(config, weights, batches, 6 * B * T * (products + pairs))


def gpt_small() -> Problem:
    """GPT, width 128, 4 layers, 128 tokens, batch 16."""
    return _gpt(128, 4, 128, 16)


def gpt_medium() -> Problem:
    """GPT, width 256, 6 layers, 256 tokens, batch 8."""
    return _gpt(256, 6, 256, 8)


def bert() -> Problem:
    """The forward pass of an encoder of BERT-base's size, 128 tokens, batch 4.

    Post-norm layers with biases, tanh-GELU, LayerNorm with eps = 1e-12. Its batch is (tokens, types,
    weights), and its "loss" the sum of the last hidden states [B, T, D] by these weights.
    """
    V, T, B, L, D, H, M = 30522, 128, 4, 12, 768, 12, 3072
    rng = np.random.default_rng(0)

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.float32)

    def norm(*shape: int) -> dict[str, np.ndarray]:
        return {"scale": np.ones(shape, np.float32), "bias": zeros(*shape)}

    def dense(inputs: int, outputs: int) -> dict[str, np.ndarray]:
        return {"kernel": _normal(rng, 0.02, L, inputs, outputs), "bias": zeros(L, outputs)}

    weights = {
        "embed": {
            "token": _normal(rng, 0.02, V, D),
            "position": _normal(rng, 0.02, T, D),
            "type": _normal(rng, 0.02, 2, D),
            "norm": norm(D),
        },
        "layers": {
            "attention": {name: dense(D, D) for name in ("query", "key", "value", "out")},
            "attention_norm": norm(L, D),
            "mlp": {"up": dense(D, M), "down": dense(M, D)},
            "mlp_norm": norm(L, D),
        },
    }
    tokens = rng.integers(0, V, (B, T)).astype(np.int32)
    types = (np.arange(T) >= T // 2).astype(np.int32)[None].repeat(B, 0)
    config = {"vocab": V, "width": D, "layers": L, "heads": H, "mlp_width": M, "context": T}
    flops = 2 * B * T * L * (4 * D * D + 2 * D * M + 2 * T * D)
    probe = _normal(rng, (B * T * D) ** -0.5, B, T, D)
    return Problem(config, weights, [(tokens, types, probe)], flops, checked=1)


def gemm() -> Problem:
    """One product of two square matrices: what the other rows' rates are a share of."""
    return Problem({}, {}, [()], 2 * 2048**3, checked=1)


def _dense(rng: np.random.Generator, inputs: int, outputs: int) -> dict[str, np.ndarray]:
    kernel = _normal(rng, (2 / inputs) ** 0.5, inputs, outputs)
    return {"kernel": kernel, "bias": np.zeros(outputs, np.float32)}


def _conv(rng: np.random.Generator, size: int, inputs: int, outputs: int) -> np.ndarray:
    return _normal(rng, (2 / (size * size * inputs)) ** 0.5, size, size, inputs, outputs)


def _pictures(rng: np.random.Generator, B: int, *shape: int) -> list[tuple[np.ndarray, ...]]:
    """Draw batches of (pictures, labels): one of ten patterns each, under ten times the noise.

    There are more of them than steps that are checked, so that none is learnt by heart: a loss
    near 0 would be no measure of who computes the same.
    """
    patterns = _normal(rng, 0.1, 10, *shape)
    labels = [rng.integers(0, 10, B).astype(np.int32) for _ in range(64)]
    return [(patterns[y] + _normal(rng, 1.0, B, *shape), y) for y in labels]


def digits_mlp() -> Problem:
    """A perceptron of pictures of 8 x 8, two hidden layers of 128 and ReLU, batch 64."""
    rng = np.random.default_rng(0)
    sizes = (64, 128, 128, 10)
    layers = [_dense(rng, *pair) for pair in pairwise(sizes)]
    flops = 6 * 64 * sum(a * b for a, b in pairwise(sizes))
    return Problem({"sizes": sizes}, {"layers": layers}, _pictures(rng, 64, 64), flops)


def cnn() -> Problem:
    """Two convolutions of 3 x 3, each with ReLU and max pooling of 2 x 2, and two linear layers.

    Pictures are [64, 28, 28, 1].
    """
    rng = np.random.default_rng(0)
    convolutions = [
        {"kernel": _conv(rng, 3, *pair), "bias": np.zeros(pair[1], np.float32)}
        for pair in ((1, 32), (32, 64))
    ]
    layers = [_dense(rng, 7 * 7 * 64, 128), _dense(rng, 128, 10)]
    products = 28 * 28 * 9 * 32 + 14 * 14 * 9 * 32 * 64 + 7 * 7 * 64 * 128 + 128 * 10
    weights = {"convolutions": convolutions, "layers": layers}
    return Problem({}, weights, _pictures(rng, 64, 28, 28, 1), 6 * 64 * products, adamw=_SMOOTH)


def resnet() -> Problem:
    """ResNet-18 for pictures [32, 32, 32, 3]: BatchNorm by the batch, eps = 1e-5.

    Blocks are {"conv1", "norm1", "conv2", "norm2"}, and {"shortcut", "shortcut_norm"} where the
    shape changes; convolutions have no bias.
    """
    rng = np.random.default_rng(0)

    def norm(width: int) -> dict[str, np.ndarray]:
        return {"scale": np.ones(width, np.float32), "bias": np.zeros(width, np.float32)}

    widths, size, inputs = (64, 128, 256, 512), 32, 64
    stages: list[list[dict[str, Any]]] = []
    products = size**2 * 27 * 64
    for i, width in enumerate(widths):
        size = size // 2 if i else size
        stages.append([])
        for _ in range(2):
            block = {
                "conv1": _conv(rng, 3, inputs, width),
                "norm1": norm(width),
                "conv2": _conv(rng, 3, width, width),
                "norm2": norm(width),
            }
            if inputs != width:
                block |= {"shortcut": _conv(rng, 1, inputs, width), "shortcut_norm": norm(width)}
            products += size**2 * sum(x.size for x in block.values() if not isinstance(x, dict))
            stages[-1].append(block)
            inputs = width
    head = _dense(rng, inputs, 10)
    weights = {
        "stem": {"conv": _conv(rng, 3, 3, 64), "norm": norm(64)},
        "stages": stages,
        "head": head,
    }
    config = {"widths": widths, "blocks": (2, 2, 2, 2)}
    flops = 6 * 32 * (products + inputs * 10)
    return Problem(config, weights, _pictures(rng, 32, 32, 32, 3), flops, adamw=_SMOOTH)
