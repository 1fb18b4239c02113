"""Train weights that will be rounded."""

from typing import Any

import jax

from fnml.core import Model, Param, map_with_name
from fnml.transforms._edited import Edited, Targets, matrices, opened, refuse_order
from fnml.transforms._quantize import Grid, check_grid, restored, round_to

PyTree = Any


def quantize_aware(
    model: Model,
    bits: int = 8,
    *,
    group: int | None = None,
    zero_point: bool = False,
    targets: Targets = None,
) -> Model:
    """Compute with weights rounded as :func:`quantize` would round them, and train them.

    The parameters are the plain model's, in float; ``apply`` rounds them to the grid and back.
    The gradient passes through the rounding as if it were not there (the straight-through
    estimator): the gradient of ``w`` is that of the rounded weight.

    Law: converting changes nothing. With the same settings ``q = quantize(m, ...)`` and trained
    parameters ``p``, ``q.apply(adapt(q, p), x) == quantize_aware(m, ...).apply(p, x)`` bit for
    bit.

    Source: Jacob et al. 2018, arXiv:1712.05877, section 3; the estimator: Bengio et al. 2013,
    arXiv:1308.3432.

    Args:
      targets: path globs in the spec of the plain model, by default every float matrix; the other
        arguments are those of :func:`quantize`.

    Raises:
      ConfigError: see :func:`quantize`.
      LayoutError: ``model`` is quantised, quantisation-aware or has factors of :func:`lora`.

    >>> import jax.numpy as jnp
    >>> from fnml.models import MLPConfig, mlp
    >>> from fnml.transforms import merge
    >>> model = quantize_aware(mlp(MLPConfig(inputs=2, hidden=(), outputs=1)), bits=4)
    >>> head = {"kernel": jnp.array([[7.0], [2.4]]), "bias": jnp.zeros(1)}
    >>> merge(model, {"hidden": [], "head": head})["head"]["kernel"].tolist()
    [[7.0], [2.0]]
    """
    once = "weights are rounded once: choose quantize_aware(model, ...) to train or "
    refuse_order(
        model,
        "quantize_aware",
        {
            "quantize": once + "quantize(model, ...) to keep",
            "quantize_aware": once + "quantize(model, ...) to keep",
            "lora": "its base does not train. To train factors over rounded weights: "
            "lora(quantize(model, ...), ...)",
        },
    )
    grid, inner = Grid(bits, group, zero_point), opened(model)
    chosen = check_grid(
        grid, matrices(inner.root.spec, targets, "quantize_aware"), "quantize_aware"
    )

    def weights(params: PyTree, key: jax.Array | None) -> PyTree:
        return map_with_name(
            lambda name, w: _straight_through(w, chosen[name], grid) if name in chosen else w,
            inner.weights(params, key),
        )

    names = (*inner.names, "quantize_aware")
    return Model(model.spec, Edited(inner.root, weights, inner.store, names), model.state)


def _straight_through(w: jax.Array, param: Param, grid: Grid) -> jax.Array:
    @jax.custom_jvp
    def rounded(w: jax.Array) -> jax.Array:
        return restored(round_to(w, param, grid), param).astype(w.dtype)

    # Not w + stop_gradient(rounded - w): in floats that sum is not the rounded weight.
    rounded.defjvp(lambda primals, tangents: (rounded(*primals), tangents[0]))
    return rounded(w)
