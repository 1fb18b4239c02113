"""Low-rank adaptation: train a few numbers beside frozen weights."""

from typing import Any

import jax
import jax.numpy as jnp

from fnml.core import ConfigError, Model, Param, fold_name, init, map_with_name
from fnml.transforms._edited import Edited, Targets, as_matrix, matrices, opened
from fnml.transforms._freeze import frozen_param, hold

PyTree = Any


def lora(
    model: Model,
    rank: int = 8,
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: Targets = None,
) -> Model:
    """Freeze a model and add trainable low-rank factors to its weight matrices.

    The weight that ``apply`` uses is ``W + alpha / rank * A @ B`` with A [in, rank] and B [rank,
    out]. Parameters become ``{"base": ..., "lora": {path: {"a": A, "b": B}}}``: the base as it
    was and frozen, the factors named after the weight they change. Everything else of the model
    (its state, ``key=`` and other keywords) passes through.

    A weight of more dimensions is a matrix where the two sides are smallest: [D, H, K] is D by
    H * K, a convolution [h, w, C, F] with more than h * w features is h * w * C by F. Leading
    axes named ``"layers"``, ``"experts"`` or ``"members"`` are stacks: each entry has factors of
    its own. Where weights are quantised, pruned or cast, the factors are added to what comes out,
    under the names of the plain model.

    As weights are edited, not layers, it acts on any model; the price is that A @ B is formed in
    full, and the gradient of W on the way to those of A and B, which is not kept. The paper's
    dropout is on the layer's input; here ``dropout`` drops ranks: with a ``key``, each column of
    A is 0 with that probability in this call, else divided by ``1 - dropout``.

    Laws: with B = 0, as drawn, ``lora(m).apply({"base": p, "lora": f}, x) == m.apply(p, x)`` bit
    for bit, and the base's random draws stay what they are. ``m.apply(merge(lora(m), q), x) ==
    lora(m).apply(q, x)`` to rounding, without a key.

    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; over quantised weights: Dettmers et al.
    2023, arXiv:2305.14314.

    Args:
      model: any model.
      rank: the rank of what is added, at most that of each weight.
      alpha: how strongly it is added; ``None`` for ``rank``, that is a factor of 1.
      dropout: the share of ranks dropped in training.
      targets: path globs in the spec of the plain model, by default every float matrix.

    Raises:
      ConfigError: a number is out of range, or a target is no float matrix; all are listed.

    >>> from fnml.core import count
    >>> from fnml.models import GPTConfig, gpt
    >>> model = lora(gpt(GPTConfig(width=64)), rank=2, targets="layers/attention/*")
    >>> count(model.spec["lora"]), model.spec["lora"]["layers/attention/query"]["a"].shape
    (4096, (4, 64, 2))
    """
    alpha = float(rank) if alpha is None else alpha
    inner = opened(model)
    views = {
        name: as_matrix(param) for name, param in matrices(inner.root.spec, targets, "lora").items()
    }
    faults = [] if rank >= 1 else [f"rank={rank}: expected 1 or more"]
    faults += [] if 0 <= dropout < 1 else [f"dropout={dropout}: expected 0 or more, and below 1"]
    faults += [
        f"rank={rank} for {name}: a matrix of {view.inputs} by {view.outputs} has less"
        for name, view in views.items()
        if rank > min(view.inputs, view.outputs)
    ]
    if faults:
        raise ConfigError("lora: " + "; ".join(faults))
    factors = {
        name: {
            "a": Param(
                (*view.shape[:-1], rank),
                (*view.axes[:-1], None),
                jax.nn.initializers.normal(view.inputs**-0.5),
            ),
            "b": Param(
                (*view.shape[:-2], rank, view.outputs),
                (*view.axes[:-2], None, view.axes[-1]),
                jax.nn.initializers.zeros,
            ),
        }
        for name, view in views.items()
    }
    spec = {"base": jax.tree.map(frozen_param, model.spec), "lora": factors}

    def added(name: str, w: jax.Array, pair: PyTree, key: jax.Array | None) -> jax.Array:
        a, b = pair["a"], pair["b"] * (alpha / rank)
        if dropout and key is not None:
            ranks = (*a.shape[:-2], 1, rank)
            kept = jax.random.bernoulli(fold_name(key, f"lora/{name}"), 1 - dropout, ranks)
            a = jnp.where(kept, a / (1 - dropout), jnp.zeros_like(a))
        return _plus(w, (a @ b).astype(w.dtype).reshape(w.shape))

    def weights(params: PyTree, key: jax.Array | None) -> PyTree:
        base = inner.weights(jax.tree.map(hold, params["base"]), key)
        pairs = params["lora"]
        return map_with_name(
            lambda name, w: added(name, w, pairs[name], key) if name in pairs else w, base
        )

    def store(params: PyTree, key: jax.Array | None) -> PyTree:
        if key is None:
            raise ConfigError("lora draws new factors: adapt(model, params, key)")
        return {"base": inner.store(params, key), **init({"lora": factors}, key)}

    return Model(spec, Edited(inner.root, weights, store, (*inner.names, "lora")), model.state)


@jax.custom_jvp
def _plus(w: jax.Array, delta: jax.Array) -> jax.Array:
    """Add, but where ``delta`` is 0 keep every bit of ``w``: -0 + 0 would be 0."""
    return jnp.where(delta == 0, w, w + delta)


@_plus.defjvp
def _plus_jvp(primals: Any, tangents: Any) -> Any:
    return _plus(*primals), tangents[0] + tangents[1]
