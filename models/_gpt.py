"""A GPT: rotary positions, RMSNorm, SwiGLU, grouped-query attention; one scan over layers."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from fnml.core import ConfigError, Mean, Model, Param, ShapeError, constrain, fold_name
from fnml.models._attention import causal_attention
from fnml.models._config import at_least, one_of, rate, refuse
from fnml.models._dropout import dropout
from fnml.models._embed import embed
from fnml.models._layers import apart, run_layers
from fnml.models._linear import linear, linears
from fnml.models._moe import Routes, moe
from fnml.models._rms_norm import rms_norm
from fnml.models._rope import Rotation, rotate, rotation
from fnml.models._swiglu import swiglu
from fnml.models._wide import wide

PyTree = Any
Layer = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]
Layers = Callable[[Layer], Layer]
Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Experts = Callable[..., tuple[jax.Array, Routes]]


@dataclass(frozen=True)
class GPTConfig:
    """Describe a GPT.

    Raises:
      ConfigError: a field is out of range or does not fit another; every fault is named.

    >>> GPTConfig(vocab=256, width=128, heads=4).head_width
    32
    """

    vocab: int = 256
    """The number of tokens, V."""
    width: int = 128
    """The width of the residual stream, D."""
    layers: int = 4
    """The number of layers, L."""
    heads: int = 4
    """The number of query heads, H; divides ``width`` into an even head width."""
    kv_heads: int | None = None
    """The number of key and value heads, K; divides ``heads``. ``None`` for as many as heads."""
    mlp_width: int | None = None
    """The hidden width of the feed-forward layers, M; ``None`` for 8/3 of ``width``, rounded up
    to a multiple of 32."""
    experts: int | None = None
    """How many feed-forward layers there are to choose from, E; ``None`` for one dense layer."""
    experts_per_token: int = 2
    """How many experts each token is sent to, with ``experts``."""
    context: int = 128
    """The most tokens the model reads at once."""
    dropout: float = 0.0
    """The share dropped from the embedding and from each residual branch in training."""
    rope_base: float = 10_000.0
    """The base of the rotary frequencies."""
    tied: bool = False
    """Whether the head is the embedding's table."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """The dtype of activations and matrix products; ``None`` for that of the parameters."""
    unroll: int = 8
    """The most layers per turn of the loop over layers. An unrolled step is faster on a CPU
    and has the same bits; 1 keeps a deep model's program small."""
    stacked: bool = True
    """Whether the layers' parameters lie stacked along a leading axis, or apart in a list. On a CPU
    XLA copies each layer's matrices out of a stack, and their gradients into one. The program grows
    with depth; the results are the same to rounding."""

    def __post_init__(self) -> None:
        sizes = ("vocab", "width", "layers", "heads", "context", "unroll")
        faults = at_least(self, 1, *sizes, "kv_heads", "mlp_width", "experts")
        faults += at_least(self, 1, "experts_per_token")
        if self.experts is not None and self.experts_per_token > self.experts:
            faults.append(
                f"experts_per_token={self.experts_per_token} is more than experts={self.experts}"
            )
        if not faults:
            if self.width % self.heads:
                faults.append(
                    f"heads={self.heads} does not divide width={self.width}: "
                    "expected a whole head width"
                )
            elif self.head_width % 2:
                faults.append(
                    f"heads={self.heads} and width={self.width} make heads of width "
                    f"{self.head_width}: expected an even one, rotary positions turn pairs"
                )
            if self.heads % self.groups:
                faults.append(
                    f"kv_heads={self.kv_heads} does not divide heads={self.heads}: each key "
                    "head serves the same number of query heads"
                )
        if not self.rope_base > 1:
            faults.append(f"rope_base={self.rope_base}: expected more than 1")
        faults += rate(self, "dropout") + one_of(self, "dtype", (None, "float32", "bfloat16"))
        refuse(self, faults)

    @property
    def head_width(self) -> int:
        """The width of one head, D / H."""
        return self.width // self.heads

    @property
    def groups(self) -> int:
        """The number of key and value heads, K."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def hidden(self) -> int:
        """The hidden width of the feed-forward layers, M."""
        return -(-self.width * 8 // 96) * 32 if self.mlp_width is None else self.mlp_width


def _spec(config: GPTConfig) -> PyTree:
    """Describe the parameters; the layers lie stacked along a leading axis, or apart."""
    L, D, M, V = config.layers, config.width, config.hidden, config.vocab
    H, K, Dh = config.heads, config.groups, config.head_width

    def stacked(shape: tuple[int, ...], axes: tuple[str | None, ...], std: float) -> Param:
        return Param((L, *shape), ("layers", *axes), jax.nn.initializers.normal(std))

    def scale(*layers: int) -> dict[str, Param]:
        axes = ("layers", "embed")[-1 - len(layers) :]
        return {"scale": Param((*layers, D), axes, jax.nn.initializers.ones)}

    # Two branches per layer add up in the residual stream: 1 / sqrt(2 L) keeps its variance
    # independent of depth (Radford et al. 2019, GPT-2, section 2.3).
    branch = 1 / math.sqrt(2 * L)
    E, each = ((), ()) if config.experts is None else ((config.experts,), ("experts",))
    spec: dict[str, Any] = {
        "embed": {"table": Param((V, D), ("vocab", "embed"), jax.nn.initializers.normal(0.02))},
        "layers": {
            "attention_norm": scale(L),
            "attention": {
                "query": stacked((D, H, Dh), ("embed", "heads", "head_dim"), D**-0.5),
                "key": stacked((D, K, Dh), ("embed", "kv_heads", "head_dim"), D**-0.5),
                "value": stacked((D, K, Dh), ("embed", "kv_heads", "head_dim"), D**-0.5),
                "out": stacked((H, Dh, D), ("heads", "head_dim", "embed"), branch * D**-0.5),
            },
            "mlp_norm": scale(L),
            "mlp": {
                "gate": stacked((*E, D, M), (*each, "embed", "mlp"), D**-0.5),
                "up": stacked((*E, D, M), (*each, "embed", "mlp"), D**-0.5),
                "down": stacked((*E, M, D), (*each, "mlp", "embed"), branch * M**-0.5),
            },
        },
        "norm": scale(),
    }
    if config.experts is not None:
        # Small, so that at first all experts are about equally likely.
        spec["layers"]["mlp"]["router"] = stacked((D, *E), ("embed", None), 0.02)
    if not config.stacked:
        spec["layers"] = apart(spec["layers"])
    if not config.tied:
        head = Param((D, V), ("embed", "vocab"), jax.nn.initializers.normal(0.02))
        spec["head"] = {"kernel": head}
    return spec


def embed_tokens(config: GPTConfig, params: PyTree, tokens: jax.Array) -> jax.Array:
    """Return the residual stream before the first layer: [B, T] to [B, T, D]."""
    if tokens.ndim != 2 or tokens.shape[1] > config.context:
        raise ShapeError(
            f"the GPT got tokens {tokens.shape}: expected [B, T] with T up to "
            f"context={config.context}"
        )
    table = params["embed"]["table"]
    return embed(tokens, table).astype(config.dtype or table.dtype)


def project_heads(
    config: GPTConfig, params: PyTree, x: jax.Array, by: Rotation
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return one layer's rotated queries and keys, and its values, for x [B, T, D]."""
    x = rms_norm(x, params["attention_norm"]["scale"])

    kernels = [params["attention"][name] for name in ("query", "key", "value")]
    matrices = [kernel.reshape(config.width, math.prod(kernel.shape[1:])) for kernel in kernels]
    q, k, v = (
        y.reshape(*x.shape[:2], *kernel.shape[1:])
        for y, kernel in zip(linears(x, matrices), kernels, strict=True)
    )
    return rotate(q, by), rotate(k, by), v  # [B, T, H, D / H], [B, T, K, D / H] twice


def finish_layer(
    config: GPTConfig,
    params: PyTree,
    x: jax.Array,
    attended: jax.Array,
    key: jax.Array | None = None,
    experts: Experts = moe,
) -> tuple[jax.Array, jax.Array | None]:
    """Add one layer's two branches to x [B, T, D], given what its heads read [B, T, H, D / H].

    The second result is how unevenly the experts are used, ``None`` without experts.
    """
    out = params["attention"]["out"].reshape(config.width, config.width)
    y = checkpoint_name(linear(attended.reshape(x.shape), out), "attention_out")
    y = dropout(y, config.dropout, None if key is None else fold_name(key, "attention"))
    mlp = params["mlp"]
    y, x = rms_norm(x, params["mlp_norm"]["scale"], y)
    balance = None
    if config.experts is None:
        gate, up = linears(y, [mlp["gate"], mlp["up"]])  # [B, T, M]
        y = linear(swiglu(gate, up), mlp["down"])  # [B, T, D]
    else:
        y, routes = experts(y, mlp, experts_per_token=config.experts_per_token)
        balance = routes.balance
    y = checkpoint_name(y, "mlp_out")
    return x + dropout(y, config.dropout, None if key is None else fold_name(key, "mlp")), balance


def read_logits(config: GPTConfig, params: PyTree, x: jax.Array) -> jax.Array:
    """Return the logits [B, T, V], at least float32, after the last layer."""
    x = rms_norm(x, params["norm"]["scale"])
    kernel = params["embed"]["table"].T if config.tied else params["head"]["kernel"]
    return linear(x, kernel, out_dtype=wide(x.dtype))


def _scan(config: GPTConfig, layer: Layer) -> Layer:
    """Run one layer after the other."""
    unroll = min(config.unroll, config.layers)
    return lambda x, inputs: run_layers(layer, x, *inputs, unroll=unroll)


def gpt(
    config: GPTConfig,
    *,
    layers: Layers | None = None,
    attention: Attention = causal_attention,
    experts: Experts = moe,
    residual: PartitionSpec | None = None,
) -> Model:
    """Build a GPT: ``apply(params, tokens, *, key=None) -> logits``.

    ``tokens`` are int [B, T] with T up to ``context``, logits [B, T, V] float32. Dropout happens
    only with a ``key``. The layers' parameters are stacked and run by ``lax.scan``, so compile
    time does not grow with depth, unless ``config.stacked`` is off. A layer names ``"attention_out"`` and ``"mlp_out"`` for
    ``jax.checkpoint`` policies.

    With ``experts``, ``apply(..., balance=True)`` returns ``(logits, balance)``: a
    :class:`fnml.Mean` over tokens of :func:`route`'s balance, averaged over layers. Add 0.01 of its
    value to the loss, and put it into ``Metrics.values``. Like a batch norm's moments it belongs to
    the batch it is computed on, so the layout transforms average it over logical shards.

    Three parts can be replaced by functions that compute the same in another place (docs/parallel.md):

    Args:
      config: the sizes.
      layers: turns one layer, the body of a scan, into the function of the stacked layers; by default
        ``lax.scan``. :func:`fnml.transforms.pipeline` is such a function.
      attention: ``attention(q, k, v)`` with the shapes of :func:`causal_attention`, such as that of
        :func:`fnml.parallel.ring_attention`.
      experts: has the signature of :func:`moe`, as :func:`fnml.parallel.expert_moe` makes it.
      residual: how the residual stream [B, T, D] lies on the mesh that is set, such as
        ``P("data")`` (:func:`fnml.core.constrain`). Where ``"embed"`` is sharded (FSDP), the compiler
        would otherwise divide the stream by width, as the table it comes from, not by batch.

    Law: changing token t changes no bit of the logits before t (with experts, to rounding: rows
    meet other rows in a product).

    Source: Touvron et al. 2023, arXiv:2302.13971, section 2.2 (RMSNorm before each branch,
    SwiGLU, rotary positions); grouped queries: Ainslie et al. 2023, arXiv:2305.13245.

    Raises:
      ShapeError: ``tokens`` are not [B, T], or longer than ``context``.
      ConfigError: the balance of a model without experts is asked for, or ``layers`` are given for
        parameters that are not stacked.

    >>> import jax, jax.numpy as jnp
    >>> from fnml.core import init
    >>> model = gpt(GPTConfig(vocab=11, width=8, layers=2, heads=2, context=16))
    >>> model.apply(init(model.spec, jax.random.key(0)), jnp.zeros((3, 5), jnp.int32)).shape
    (3, 5, 11)
    """

    if layers is not None and not config.stacked:
        raise ConfigError(
            "gpt got layers= for a config with stacked=False: what runs layers elsewhere takes a stack"
        )
    run: Layers = layers or functools.partial(_scan, config)

    def apply(
        params: PyTree, tokens: jax.Array, *, key: jax.Array | None = None, balance: bool = False
    ) -> Any:
        if balance and config.experts is None:
            raise ConfigError("apply got balance=True for a GPT without experts: set experts")
        if config.dropout == 0:
            key = None
        x = embed_tokens(config, params, tokens)
        if residual is not None:
            x = constrain(x, residual)
        x = dropout(x, config.dropout, None if key is None else fold_name(key, "embed"))
        T = tokens.shape[1]
        # A symbolic length (jax.export) has no constants.
        positions = np.arange(T) if isinstance(T, int) else jnp.arange(T)
        by = rotation(positions, config.head_width, base=config.rope_base)

        def layer(x: jax.Array, inputs: tuple[PyTree, jax.Array | None]) -> tuple[jax.Array, Any]:
            params, key = inputs
            q, k, v = project_heads(config, params, x, by)
            return finish_layer(config, params, x, attention(q, k, v), key, experts)

        keys = None if key is None else jax.random.split(fold_name(key, "layers"), config.layers)
        x, shares = run(layer)(x, (params["layers"], keys))
        logits = read_logits(config, params, x)
        if not balance:
            return logits
        count = jnp.asarray(tokens.size, jnp.float32)
        return logits, Mean(jnp.mean(shares) * count, count)

    return Model(_spec(config), apply)
