"""Models made of other models: the weights that ``apply`` needs, computed from what is stored."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fnml.core import ConfigError, LayoutError, Model, Param, ShapeError, leaf_names, mask

PyTree = Any
Targets = str | Sequence[str] | None

STACKED = ("layers", "experts", "members")
"""Leading axes of these names hold one array per entry, as a scan over layers wants them."""


# Functions compare by identity, and so do these: ``jax.jit(model.apply)`` has to hash them.
@dataclass(frozen=True, eq=False)
class Edited:
    """The ``apply`` of an edited model: a root model's, on weights made from other parameters.

    Attributes:
      root: the model as it was before the first edit.
      weights: ``weights(params, key) -> root params``; ``key`` is the call's, or ``None``.
      store: ``store(root params, key) -> params``, for :func:`adapt`.
      names: the transforms applied, the first one first.
      lazy: like ``weights``, for ``apply`` alone: root params in which some arrays are stand-ins
        that a layer knows how to use; ``None`` where there are none. An edit around this one
        builds on ``weights``.
    """

    root: Model
    weights: Callable[[PyTree, jax.Array | None], PyTree]
    store: Callable[[PyTree, jax.Array | None], PyTree]
    names: tuple[str, ...]
    lazy: Callable[[PyTree, jax.Array | None], PyTree] | None = None

    def __call__(self, params: PyTree, *inputs: Any, **options: Any) -> Any:
        weights = (self.lazy or self.weights)(params, options.get("key"))
        return self.root.apply(weights, *inputs, **options)


def opened(model: Model) -> Edited:
    """Return what an edit builds on: the model's own edits, or none."""
    if isinstance(model.apply, Edited):
        return model.apply
    return Edited(model, lambda params, key: params, lambda params, key: params, ())


def refuse_order(model: Model, name: str, rules: Mapping[str, str]) -> None:
    """Refuse to put the transform ``name`` around the ones that ``rules`` name.

    Raises:
      LayoutError: the message is the rule, and the order that works.
    """
    for inside in opened(model).names:
        if inside in rules:
            raise LayoutError(f"{name} cannot go around {inside}: {rules[inside]}")


def merge(model: Model, params: PyTree) -> PyTree:
    """Return the parameters with which the model before its edits computes the same.

    For :func:`lora` that is ``W + alpha / rank * A @ B``, for :func:`quantize` the dequantised
    weights, for :func:`prune` the masked ones, for :func:`cast` those in their own dtype; for
    several at once the outcome of all. A model without edits keeps its parameters.

    Law: ``root.apply(merge(model, params), x) == model.apply(params, x)`` to rounding.

    >>> from fnml.core import init
    >>> from fnml.models import MLPConfig, mlp
    >>> from fnml.transforms import lora
    >>> base = mlp(MLPConfig(inputs=4, hidden=(8,), outputs=2))
    >>> params = init(base.spec, jax.random.key(0))
    >>> tuned = lora(base, rank=2)
    >>> merged = merge(tuned, adapt(tuned, params, jax.random.key(1)))
    >>> all(jax.tree.leaves(jax.tree.map(jnp.array_equal, merged, params)))
    True
    """
    return opened(model).weights(params, None)


def adapt(model: Model, params: PyTree, key: jax.Array | None = None) -> PyTree:
    """Return the parameters of an edited model that stand for those of the model before its edits.

    :func:`lora` adds fresh factors, :func:`quantize` rounds to codes, :func:`prune` takes its
    mask, :func:`cast` narrows.

    Law: ``merge(model, adapt(model, p, key))`` is ``p`` bit for bit for ``lora`` and ``freeze``,
    within half a step of the scales for ``quantize``, rounded to the dtype for ``cast``, and ``p``
    where the mask is set and exactly 0 elsewhere for ``prune``.

    Args:
      params: the root model's parameters, such as a checkpoint's.
      key: draws what is new (``lora``'s factors A); needed only where something is.

    Raises:
      ConfigError: the model draws new parameters, and there is no key.
      ShapeError: the parameters are not those of the model before its edits; all differences are
        listed.

    >>> from fnml.core import init
    >>> from fnml.models import MLPConfig, mlp
    >>> from fnml.transforms import quantize
    >>> base = mlp(MLPConfig(inputs=4, hidden=(), outputs=2))
    >>> params = init(base.spec, jax.random.key(0))
    >>> adapt(quantize(base), params)["head"]["kernel"]["codes"].dtype
    dtype('int8')
    """
    edited = opened(model)
    expected, got = _described(edited.root.spec), _described(params)
    faults = [
        f"{name}: expected {expected.get(name, 'nothing')}, got {got.get(name, 'nothing')}"
        for name in sorted(expected.keys() | got.keys())
        if expected.get(name) != got.get(name)
    ]
    if faults:
        raise ShapeError(
            "adapt takes the parameters of the model before its edits; these differ:\n"
            + "\n".join(faults)
        )
    return edited.store(params, key)


def _described(tree: PyTree) -> dict[str, str]:
    leaves = zip(leaf_names(tree), jax.tree.leaves(tree), strict=True)
    return {name: f"{jnp.dtype(x.dtype)}{list(x.shape)}" for name, x in leaves}


class FrozenParam(Param):
    """A parameter that does not train: no gradient and no optimizer state are kept for it."""


class QuantizedParam(FrozenParam):
    """A part of a quantised weight: its codes, scales or zero points."""


class Matrix(NamedTuple):
    """A parameter seen as matrices [*stack, inputs, outputs].

    Attributes:
      shape: ``(*stack, inputs, outputs)``.
      axes: the logical names of these, ``None`` where several dimensions are one.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]

    @property
    def inputs(self) -> int:
        return self.shape[-2]

    @property
    def outputs(self) -> int:
        return self.shape[-1]


def stack_depth(param: Param) -> int:
    """Count the leading axes along which a parameter is one array per layer, expert or member."""
    depth = 0
    while depth < len(param.axes) and param.axes[depth] in STACKED:
        depth += 1
    return depth


def as_matrix(param: Param) -> Matrix:
    """See a parameter of two or more dimensions as a matrix from inputs to outputs.

    Its dimensions, without the stacked ones, are cut in two where the products of both sides add
    up to the least, the last such place: [D, H, K] is D by H * K, [H, K, D] is H * K by D, a
    convolution [h, w, C, F] is h * w * C by F, where F is more than h * w.

    >>> as_matrix(Param((4, 8, 2, 3), ("layers", "embed", "heads", None), jnp.zeros)).shape
    (4, 8, 6)
    """
    depth = stack_depth(param)
    sizes, names = param.shape[depth:], param.axes[depth:]
    cut = min(range(len(sizes) - 1, 0, -1), key=lambda at: prod(sizes[:at]) + prod(sizes[at:]))
    axes = (names[0] if cut == 1 else None, names[-1] if cut == len(sizes) - 1 else None)
    return Matrix(
        (*param.shape[:depth], prod(sizes[:cut]), prod(sizes[cut:])), (*param.axes[:depth], *axes)
    )


def is_float(x: Any) -> bool:
    """Tell whether an array or a :class:`fnml.Param` holds floating-point numbers."""
    return bool(jnp.issubdtype(x.dtype, jnp.floating))


def matrices(spec: PyTree, targets: Targets, name: str) -> dict[str, Param]:
    """Return the parameters that a transform of weight matrices is to change, by path.

    Without ``targets`` these are all float parameters of two or more dimensions, not counting
    stacked ones; what :func:`quantize` stores is left out.

    Raises:
      ConfigError: a glob matches nothing, or a parameter that is no float matrix; all are listed.
    """

    def fault(param: Param) -> str | None:
        if isinstance(param, QuantizedParam):
            return "it is quantised already"
        if not is_float(param):
            return f"it holds {jnp.dtype(param.dtype)}, expected floats"
        if len(param.shape) - stack_depth(param) < 2:
            return f"its shape {param.shape} with axes {param.axes} is no matrix"
        return None

    chosen = jax.tree.leaves(mask(spec, targets or "**")) if jax.tree.leaves(spec) else []
    params = dict(zip(leaf_names(spec), jax.tree.leaves(spec), strict=True))
    picked = [found for found, hit in zip(params, chosen, strict=True) if hit]
    faults = {found: why for found in picked if (why := fault(params[found]))}
    if faults and targets is not None:
        raise ConfigError(
            f"{name} cannot change these parameters:\n"
            + "\n".join(f"{found}: {why}" for found, why in faults.items())
        )
    picked = [found for found in picked if found not in faults]
    if not picked:
        raise ConfigError(
            f"the model has no float matrix for {name} to change; what quantize stores is changed once"
        )
    return {found: params[found] for found in picked}
