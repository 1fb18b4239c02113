"""A bidirectional encoder in the manner of BERT; its layers lie stacked, or apart."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from fnml.core import Model, Param, ShapeError, fold_name
from fnml.models._config import at_least, one_of, rate, refuse
from fnml.models._dropout import dropout
from fnml.models._embed import embed
from fnml.models._gelu import gelu
from fnml.models._layer_norm import layer_norm
from fnml.models._layers import apart, run_layers
from fnml.models._linear import linear, linears
from fnml.models._wide import wide
from fnml.pallas_kernels import attention

PyTree = Any
Layer = Callable[[jax.Array, tuple[PyTree, jax.Array | None]], tuple[jax.Array, None]]


@dataclass(frozen=True)
class EncoderConfig:
    """Describe an encoder. The defaults are a small one; see :func:`encoder` for BERT-base's.

    Raises:
      ConfigError: a field is out of range or does not fit another; every fault is named.

    >>> EncoderConfig(width=128, heads=4).hidden
    512
    """

    vocab: int = 256
    """The number of tokens, V."""
    width: int = 128
    """The width of the residual stream, D."""
    layers: int = 4
    """The number of layers, L."""
    heads: int = 4
    """The number of heads, H; divides ``width``."""
    mlp_width: int | None = None
    """The hidden width of the feed-forward layers, M; ``None`` for four times ``width``."""
    context: int = 128
    """The most tokens the model reads at once: there is a learned vector for each position."""
    types: int = 0
    """The number of token types (BERT's segments); 0 for none."""
    dropout: float = 0.0
    """The share dropped from the embedding and from each residual branch in training."""
    eps: float = 1e-12
    """What the norms add to the variance."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """The dtype of activations and matrix products; ``None`` for that of the parameters."""
    unroll: int = 8
    """The most layers per turn of the loop over stacked layers: 1 keeps a deep model's program small.
    Unrolled, it computes the same to rounding."""
    stacked: bool = True
    """Whether the layers' parameters lie stacked along a leading axis, or apart in a list. On a CPU
    XLA copies each layer's matrices out of a stack: apart, the forward pass of a model of BERT-base's
    size takes 0.93 of the time and a tenth of the working memory. The program grows with depth.
    The results are the same to rounding."""

    def __post_init__(self) -> None:
        sizes = ("vocab", "width", "layers", "heads", "context", "unroll")
        faults = at_least(self, 1, *sizes, "mlp_width") + at_least(self, 0, "types")
        if not faults and self.width % self.heads:
            faults.append(
                f"heads={self.heads} does not divide width={self.width}: "
                "expected a whole head width"
            )
        if not self.eps > 0:
            faults.append(f"eps={self.eps}: expected more than 0")
        faults += rate(self, "dropout") + one_of(self, "dtype", (None, "float32", "bfloat16"))
        refuse(self, faults)

    @property
    def hidden(self) -> int:
        """The hidden width of the feed-forward layers, M."""
        return 4 * self.width if self.mlp_width is None else self.mlp_width


def _spec(config: EncoderConfig) -> PyTree:
    """Describe the parameters."""
    L, D, M, H = config.layers, config.width, config.hidden, config.heads
    # Devlin et al. 2019: every weight is drawn with a deviation of 0.02, whatever the width.
    normal, zeros = jax.nn.initializers.normal(0.02), jax.nn.initializers.zeros

    def table(rows: int, axis: str | None) -> Param:
        return Param((rows, D), (axis, "embed"), normal)

    def norm(*layers: int) -> dict[str, Param]:
        axes = ("layers", "embed")[-1 - len(layers) :]
        return {
            "scale": Param((*layers, D), axes, jax.nn.initializers.ones),
            "bias": Param((*layers, D), axes, zeros),
        }

    def dense(inputs: dict[str, int], outputs: dict[str, int]) -> dict[str, Param]:
        shape, axes = (*inputs.values(), *outputs.values()), (*inputs, *outputs)
        return {
            "kernel": Param((L, *shape), ("layers", *axes), normal),
            "bias": Param((L, *outputs.values()), ("layers", *outputs), zeros),
        }

    stream, heads, hidden = {"embed": D}, {"heads": H, "head_dim": D // H}, {"mlp": M}
    layers: PyTree = {
        "attention": {name: dense(stream, heads) for name in ("query", "key", "value")}
        | {"out": dense(heads, stream)},
        "attention_norm": norm(L),
        "mlp": {"up": dense(stream, hidden), "down": dense(hidden, stream)},
        "mlp_norm": norm(L),
    }
    tables = {"token": table(config.vocab, "vocab"), "position": table(config.context, None)}
    if config.types:
        tables["type"] = table(config.types, None)
    if not config.stacked:
        layers = apart(layers)
    return {"embed": {**tables, "norm": norm()}, "layers": layers}


def encoder(config: EncoderConfig) -> Model:
    """Build an encoder: ``apply(params, tokens, types=None, *, lengths=None, mask=None, key=None)``.

    ``tokens`` are int [B, T] with T up to ``context``, the result is the last hidden states [B, T,
    D], at least float32. Every token sees every other but padding, which is told by ``lengths``, int [B], or by
    ``mask``, bool [B, T], True where there is a token. What comes out at padding means nothing.
    ``types`` are int [B, T], by default all 0, for a model with ``types``. Dropout happens only
    with a ``key``. A layer names ``"attention_out"`` and ``"mlp_out"`` for ``jax.checkpoint``
    policies. BERT-base is ``EncoderConfig(vocab=30522, width=768, layers=12, heads=12, context=512,
    types=2)``, with GELU in its tanh form.

    Law: changing a token of padding changes no bit of the hidden states elsewhere.

    Source: Devlin et al. 2019, arXiv:1810.04805, section 3; the layer is that of Vaswani et al.
    2017, arXiv:1706.03762, section 3.1 (each norm behind the sum).

    Raises:
      ShapeError: ``tokens``, ``types`` or ``mask`` are not [B, T], or T is more than ``context``.

    >>> import jax, jax.numpy as jnp
    >>> from fnml.core import init
    >>> model = encoder(EncoderConfig(vocab=11, width=8, layers=2, heads=2, context=16))
    >>> params, tokens = init(model.spec, jax.random.key(0)), jnp.zeros((3, 5), jnp.int32)
    >>> model.apply(params, tokens, lengths=jnp.array([5, 2, 1])).shape
    (3, 5, 8)
    """

    def apply(
        params: PyTree,
        tokens: jax.Array,
        types: jax.Array | None = None,
        *,
        lengths: jax.Array | None = None,
        mask: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        _check(config, tokens, types, mask)
        if config.dropout == 0:
            key = None
        seen = None if mask is None else mask[:, None, None, :]

        def drop(x: jax.Array, key: jax.Array | None, name: str) -> jax.Array:
            return dropout(x, config.dropout, None if key is None else fold_name(key, name))

        def layer(x: jax.Array, inputs: tuple[PyTree, jax.Array | None]) -> tuple[jax.Array, None]:
            params, key = inputs
            weights = params["attention"]

            parts = [weights[name] for name in ("query", "key", "value")]
            q, k, v = (
                y.reshape(*x.shape[:2], config.heads, -1)
                for y in linears(
                    x,
                    [part["kernel"].reshape(config.width, -1) for part in parts],
                    [part["bias"].reshape(-1) for part in parts],
                )
            )
            y = attention(q, k, v, lengths=lengths, mask=seen).reshape(x.shape)
            kernel = weights["out"]["kernel"].reshape(-1, config.width)
            y = checkpoint_name(linear(y, kernel, weights["out"]["bias"]), "attention_out")
            x = _norm(config, params["attention_norm"], drop(y, key, "attention"), x)
            mlp = params["mlp"]
            y = gelu(linear(x, mlp["up"]["kernel"], mlp["up"]["bias"]))  # [B, T, M]
            y = checkpoint_name(linear(y, mlp["down"]["kernel"], mlp["down"]["bias"]), "mlp_out")
            return _norm(config, params["mlp_norm"], drop(y, key, "mlp"), x), None

        x = drop(_embed(config, params["embed"], tokens, types), key, "embed")
        keys = None if key is None else jax.random.split(fold_name(key, "layers"), config.layers)
        unroll = min(config.unroll, config.layers)
        x, _ = run_layers(layer, x, params["layers"], keys, unroll=unroll)
        return x.astype(wide(x.dtype))

    return Model(_spec(config), apply)


def _norm(
    config: EncoderConfig, params: PyTree, x: jax.Array, residual: jax.Array | None = None
) -> jax.Array:
    """Normalise x [B, T, D], or its sum with the residual stream."""
    out = layer_norm(x, params["scale"], params["bias"], residual, eps=config.eps)
    return out if residual is None else out[0]


def _embed(
    config: EncoderConfig, params: PyTree, tokens: jax.Array, types: jax.Array | None
) -> jax.Array:
    """Add up the vectors of tokens, positions and types, and normalise: [B, T] to [B, T, D]."""
    x = embed(tokens, params["token"]) + params["position"][None, : tokens.shape[1]]
    if config.types:
        x = x + embed(jnp.zeros_like(tokens) if types is None else types, params["type"])
    return _norm(config, params["norm"], x.astype(config.dtype or x.dtype))


def _check(
    config: EncoderConfig, tokens: jax.Array, types: jax.Array | None, mask: jax.Array | None
) -> None:
    faults = []
    if tokens.ndim != 2 or tokens.shape[1] > config.context:
        faults.append(
            f"tokens {tokens.shape}: expected [B, T] with T up to context={config.context}"
        )
    for name, x in (("types", types), ("mask", mask)):
        if x is not None and x.shape != tokens.shape:
            faults.append(f"{name} {x.shape}: expected the tokens' shape {tokens.shape}")
    if types is not None and not config.types:
        faults.append("types, which a model with types=0 does not read")
    if faults:
        raise ShapeError("the encoder got " + "; ".join(faults))
