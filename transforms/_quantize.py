"""Keep weights in 8 or 4 bits."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fnml.core import ConfigError, Model, NonFiniteError, Param, leaf_names, map_with_name
from fnml.pallas_kernels import QuantizedMatrix
from fnml.transforms._edited import (
    Edited,
    Matrix,
    QuantizedParam,
    Targets,
    as_matrix,
    matrices,
    opened,
    refuse_order,
    stack_depth,
)

PyTree = Any


class Grid(NamedTuple):
    """How numbers are rounded.

    Attributes:
      bits: 8 or 4.
      group: how many inputs share a scale; ``None`` for all of them.
      zero_point: whether the grid is shifted to the range that a group has, or symmetric.
    """

    bits: int
    group: int | None
    zero_point: bool

    @property
    def largest(self) -> int:
        """The largest code; symmetric codes go down to its negative, others to 0."""
        return 2**self.bits - 1 if self.zero_point else 2 ** (self.bits - 1) - 1


class Rounded(NamedTuple):
    """A weight on its grid.

    Attributes:
      codes: int32 [*stack, groups, inputs / groups, outputs].
      scale: float32 [*stack, groups, outputs].
      zero: int32 like ``scale``, the code of 0; ``None`` for a symmetric grid.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None


def quantize(
    model: Model,
    bits: int = 8,
    *,
    group: int | None = None,
    zero_point: bool = False,
    targets: Targets = None,
    fused: bool = False,
) -> Model:
    """Keep weight matrices as 8- or 4-bit integers with scales; activations stay what they are.

    In the spec each chosen parameter gives way to ``{"codes", "scale"}`` (and ``"zero"``), frozen;
    ``apply`` multiplies codes and scales back into the weights' own dtype. The spec needs no
    weights: :func:`fnml.abstract`, sizes and shardings are those of the quantised model, while
    ``init`` draws zeros. :func:`adapt` rounds given parameters, :func:`merge` gives them back.

    A weight is a matrix [in, out] as for :func:`lora`, in stacks one for each layer. Each output
    (channel) has its scale, or each output's ``group`` consecutive inputs. Codes are int8, uint8
    with ``zero_point``, and two in one uint8 for 4 bits: the first half of the rows in the low,
    the second in the high nibbles. The dequantised weights are temporaries of a call; it is what
    lies in memory between calls, on disk and in ``State`` that shrinks. With ``fused`` linear layers
    multiply with the codes themselves (:func:`fnml.pallas_kernels.quantized_matmul`), so that only
    a block of a matrix exists as numbers at any time, and a token by itself reads 1 or 1/2 byte a
    weight; other layers, and edits around this one, still see whole weights.

    Symmetric: ``scale = max|w| / (2**(bits - 1) - 1)``, ``codes = round(w / scale)``. With a zero
    point: ``scale = (max(w, 0) - min(w, 0)) / (2**bits - 1)``, ``zero = round(-min(w, 0) /
    scale)``, ``codes = round(w / scale) + zero``, ``w' = scale * (codes - zero)``. Both keep 0
    exactly.

    Law: ``|w - w'| <= scale / 2`` for every element, within a rounding of float32 (``1e-6 *
    max|w|``), where ``w' = merge(quantize(m), adapt(quantize(m), w))``.

    Source: Jacob et al. 2018, arXiv:1712.05877, section 2.1 (the affine grid, an exact 0).

    Args:
      bits: 8 or 4.
      group: the number of inputs that share a scale; divides the inputs of every target.
      zero_point: for weights that are not centred, such as after a ReLU.
      targets: path globs in ``model.spec``, by default every float matrix.
      fused: multiply with codes in linear layers; the same to rounding.

    Raises:
      ConfigError: a number is out of range, a group does not divide a weight's inputs, or a
        target is no float matrix; all are listed.
      LayoutError: ``model`` has factors of :func:`lora` or is :func:`quantize_aware`.

    >>> from fnml.core import abstract
    >>> from fnml.models import MLPConfig, mlp
    >>> base = mlp(MLPConfig(inputs=64, hidden=(), outputs=10))
    >>> abstract(quantize(base, bits=4, group=32).spec)["head"]["kernel"]["codes"]
    ShapeDtypeStruct(shape=(32, 10), dtype=uint8)
    """
    refuse_order(
        model,
        "quantize",
        {
            "lora": "codes are rounded and do not train, factors do, so rounding comes first: "
            "lora(quantize(model, ...), ...); or quantize what merge(model, params) gives",
            "quantize_aware": "it rounds already. Adapt the plain model, with the same settings: "
            "adapt(quantize(model, ...), params)",
        },
    )
    grid, inner = Grid(bits, group, zero_point), opened(model)
    chosen = check_grid(grid, matrices(model.spec, targets, "quantize"), "quantize")

    def restore(params: PyTree) -> PyTree:
        return map_with_name(
            lambda name, param, stored: _unpack(stored, param, grid) if name in chosen else stored,
            model.spec,
            params,
        )

    def weights(params: PyTree, key: jax.Array | None) -> PyTree:
        return inner.weights(restore(params), key)

    def lazy(params: PyTree, key: jax.Array | None) -> PyTree:
        return map_with_name(
            lambda name, param, stored: (
                _stand_in(stored, param, grid) if name in chosen else stored
            ),
            model.spec,
            params,
        )

    def store(params: PyTree, key: jax.Array | None) -> PyTree:
        values = inner.store(params, key)
        _refuse_nonfinite(values, chosen)

        @jax.jit
        def rounded(values: PyTree) -> PyTree:
            return map_with_name(
                lambda name, param, w: (
                    _pack(round_to(w, param, grid), param, grid) if name in chosen else w
                ),
                model.spec,
                values,
            )

        return rounded(values)

    spec = map_with_name(lambda name, p: _spec(p, grid) if name in chosen else p, model.spec)
    # What lies between this edit and the root may need whole weights.
    direct = lazy if fused and not inner.names else None
    names = (*inner.names, "quantize")
    return Model(spec, Edited(inner.root, weights, store, names, direct), model.state)


def check_grid(grid: Grid, chosen: dict[str, Param], name: str) -> dict[str, Param]:
    """Refuse a grid that does not fit the chosen parameters; return these.

    Raises:
      ConfigError: all faults.
    """
    faults = [] if grid.bits in (4, 8) else [f"bits={grid.bits}: expected 8 or 4"]
    if grid.group is not None and grid.group < 1:
        faults.append(f"group={grid.group}: expected 1 or more, or None")
    elif grid.group is not None:
        faults += [
            f"group={grid.group} does not divide the {as_matrix(param).inputs} inputs of {path}"
            for path, param in chosen.items()
            if as_matrix(param).inputs % grid.group
        ]
    if faults:
        raise ConfigError(f"{name}: " + "; ".join(faults))
    return chosen


def round_to(w: jax.Array, param: Param, grid: Grid) -> Rounded:
    """Put the weight that ``param`` describes on its grid."""
    blocks = _blocks(w.astype(jnp.float32), as_matrix(param), grid)
    if grid.zero_point:
        low = jnp.minimum(jnp.min(blocks, -2), 0)
        width = jnp.maximum(jnp.max(blocks, -2), 0) - low
    else:
        width = jnp.max(jnp.abs(blocks), -2)
    # Products with reciprocals are spelt out and kept apart: XLA may or may not make them of a
    # division, and codes would differ between a program that trains and one that converts.
    scale = width * np.float32(1 / grid.largest)
    # A group of zeros, or of numbers too small for a scale, rounds to 0 on any grid.
    scale = jnp.where(scale >= np.finfo(np.float32).tiny, scale, 1)
    inverse = lax.optimization_barrier(1 / scale)
    codes = jnp.round(blocks * jnp.expand_dims(inverse, -2)).astype(jnp.int32)
    if not grid.zero_point:
        return Rounded(jnp.clip(codes, -grid.largest, grid.largest), scale, None)
    zero = jnp.clip(jnp.round(-low * inverse).astype(jnp.int32), 0, grid.largest)
    codes = jnp.clip(codes + jnp.expand_dims(zero, -2), 0, grid.largest)
    return Rounded(codes, scale, zero)


def restored(rounded: Rounded, param: Param) -> jax.Array:
    """Return the weight that a rounded one stands for, in the shape and dtype of ``param``."""
    codes, scale, zero = rounded
    if zero is not None:
        codes = codes - jnp.expand_dims(zero, -2)
    # The scale may come in a narrower dtype, from a policy of mixed precision.
    w = codes.astype(jnp.float32) * jnp.expand_dims(scale.astype(jnp.float32), -2)
    return w.reshape(param.shape).astype(param.dtype if scale.dtype == jnp.float32 else scale.dtype)


def _groups(matrix: Matrix, grid: Grid) -> int:
    return 1 if grid.group is None else matrix.inputs // grid.group


def _blocks(w: jax.Array, matrix: Matrix, grid: Grid) -> jax.Array:
    """Reshape to [*stack, groups, inputs / groups, outputs]."""
    return w.reshape(*matrix.shape[:-2], _groups(matrix, grid), -1, matrix.outputs)


def _spec(param: Param, grid: Grid) -> dict[str, Param]:
    matrix, zeros = as_matrix(param), jax.nn.initializers.zeros
    if grid.bits == 8:
        dtype = jnp.uint8 if grid.zero_point else jnp.int8
        codes = QuantizedParam(param.shape, param.axes, zeros, dtype)
    else:
        rows = (*matrix.shape[:-2], -(-matrix.inputs // 2), matrix.outputs)
        # Symmetric codes are kept with 8 added, so that 0 is stored as 8 in both nibbles.
        offset = 0 if grid.zero_point else 0x88
        codes = QuantizedParam(
            rows, matrix.axes, jax.nn.initializers.constant(offset, jnp.uint8), jnp.uint8
        )
    shape = (*matrix.shape[:-2], _groups(matrix, grid), matrix.outputs)
    axes = (*matrix.axes[:-2], None, matrix.axes[-1])
    scale = QuantizedParam(shape, axes, jax.nn.initializers.ones)
    stored: dict[str, Param] = {"codes": codes, "scale": scale}
    if grid.zero_point:
        stored["zero"] = dataclasses.replace(scale, init=zeros, dtype=jnp.uint8)
    return stored


def _pack(rounded: Rounded, param: Param, grid: Grid) -> dict[str, jax.Array]:
    codes, scale, zero = rounded
    matrix = as_matrix(param)
    stored = {"scale": scale}
    if zero is not None:
        stored["zero"] = zero.astype(jnp.uint8)
    if grid.bits == 8:
        codes = codes.reshape(param.shape)
        return {"codes": codes.astype(jnp.int8 if zero is None else jnp.uint8), **stored}
    rows = codes.reshape(matrix.shape) + (8 if zero is None else 0)
    pads = [(0, 0)] * (rows.ndim - 2) + [(0, matrix.inputs % 2), (0, 0)]
    low, high = jnp.split(jnp.pad(rows, pads).astype(jnp.uint8), 2, axis=-2)
    return {"codes": low | (high << 4), **stored}


def _unpack(stored: dict[str, jax.Array], param: Param, grid: Grid) -> jax.Array:
    codes, matrix = stored["codes"], as_matrix(param)
    if grid.bits == 4:
        codes = jnp.concatenate([codes & 15, codes >> 4], -2)
        codes = lax.slice_in_dim(codes, 0, matrix.inputs, axis=codes.ndim - 2)
    codes = _blocks(codes.astype(jnp.int32), matrix, grid)
    if grid.zero_point:
        return restored(Rounded(codes, stored["scale"], stored["zero"].astype(jnp.int32)), param)
    codes = codes - 8 if grid.bits == 4 else codes
    return restored(Rounded(codes, stored["scale"], None), param)


def _stand_in(stored: dict[str, jax.Array], param: Param, grid: Grid) -> QuantizedMatrix:
    codes, scale, matrix = stored["codes"], stored["scale"], as_matrix(param)
    if grid.bits == 8:
        codes = codes.reshape(matrix.shape)
    dtype = param.dtype if scale.dtype == jnp.float32 else scale.dtype
    sizes = param.shape[stack_depth(param) :]
    return QuantizedMatrix(codes, scale, stored.get("zero"), grid.bits, sizes, jnp.dtype(dtype))


def _refuse_nonfinite(values: PyTree, chosen: dict[str, Param]) -> None:
    faults = [
        name
        for name, w in zip(leaf_names(values), jax.tree.leaves(values), strict=True)
        if name in chosen
        and not isinstance(w, jax.core.Tracer | jax.ShapeDtypeStruct)
        and not bool(jnp.all(jnp.isfinite(w)))
    ]
    if faults:
        raise NonFiniteError(
            "weights with NaN or infinities have no scale, so they cannot be quantised: "
            + ", ".join(faults)
        )
