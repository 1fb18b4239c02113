"""Check a loss's gradient against finite differences in float64."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnml.core import ConfigError, path_name
from fnml.laws._call import LossFn, check_signature, name_of, on_device
from fnml.laws._finding import Finding, coarsest
from fnml.laws._widen import widen

PyTree = Any
# A gradient this much smaller than the largest leaf's is rounding, not signal.
_FLOOR = 1e-3


def check_grad(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    key: jax.Array | None = None,
    *,
    directions: int = 6,
    coordinates: int = 4,
    seed: int = 0,
    **options: Any,
) -> list[Finding]:
    """Compare the gradient with central differences of the loss computed in float64.

    The gradient ``g`` is that of ``jax.grad``, in the loss's own precision and with its custom
    derivatives. The loss is traced once in that precision and then evaluated in float64, whatever
    it casts to, so that differences are good to about 1e-9. Per leaf, along directions ``d``
    drawn from a normal distribution, ``E[((f(p + h d) - f(p - h d)) / 2h - <g, d>)**2]`` is the
    squared norm of the gradient's error; single coordinates (where ``|g|`` is largest, and as many
    at random) show where it sits.

    The error is relative to the norm of the leaf's gradient, or to 0.1% of the largest leaf's. Its
    bound is the square root of the rounding unit of the least precise float in the loss (float32:
    3.5e-4, bfloat16: 0.09): rounding errors of a gradient stay far below, a wrong derivative far
    above.

    Args:
      loss_fn: ``loss_fn(params, batch, key, **options) -> (loss, metrics)``.
      params: parameters at which the loss is smooth; float leaves are checked.
      batch: a batch.
      key: a typed key for a loss that draws; the draws are the same in every evaluation.
      directions: the number of random directions per leaf.
      coordinates: the number of largest, and of random, coordinates per leaf.
      seed: draws directions and coordinates.
      **options: keywords of the loss, such as a model's ``state``.

    Returns:
      A finding for each leaf, the worst first.

    Raises:
      ConfigError: the loss does not fit its contract, or has no float parameter.

    >>> from fnml.core import Mean, Metrics
    >>> def loss_fn(params, batch, key):
    ...     error = Mean.of((batch - params["w"]) ** 2)
    ...     return error.value, Metrics(error.weight)
    >>> [finding] = check_grad(loss_fn, {"w": jnp.float32(0.5)}, jnp.array([1.0, 3.0]))
    >>> finding.law, finding.status
    ('w', 'held')
    """
    params, batch = on_device((params, batch))
    closed = check_signature(loss_fn, params, batch, key, **options)
    leaves, tree = jax.tree.flatten(params)
    paths = [path_name(path) or "params" for path, _ in jax.tree.leaves_with_path(params)]
    checked = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]
    if not checked:
        raise ConfigError(f"{name_of(loss_fn)} has no floating-point parameter to check")

    def of_floats(floats: list[Any], batch: PyTree, key: Any) -> jax.Array:
        full = list(leaves)
        for i, x in zip(checked, floats, strict=True):
            full[i] = x
        return loss_fn(jax.tree.unflatten(tree, full), batch, key, **options)[0]

    floats = [leaves[i] for i in checked]
    grads = [np.asarray(g, np.float64) for g in jax.jit(jax.grad(of_floats))(floats, batch, key)]
    wide = widen(of_floats, floats, batch, key)
    bound = max(math.sqrt(coarsest(closed)), 1e-6)
    rng = np.random.default_rng(seed)
    largest = max((float(np.linalg.norm(g)) for g in grads if np.all(np.isfinite(g))), default=0.0)
    with jax.enable_x64(True):
        compiled = jax.jit(wide)
        points = [np.asarray(x, np.float64) for x in floats]

        def call(points: list[np.ndarray]) -> float:
            return float(compiled([jnp.asarray(x) for x in points], batch, key))

        findings = []
        for i, (grad, at) in enumerate(zip(grads, points, strict=True)):

            def slope(direction: np.ndarray, i: int = i, at: np.ndarray = at) -> float:
                length = float(np.linalg.norm(direction))
                # Cube root of float64's unit: truncation and rounding are then of one size.
                h = 6e-6 * max(1.0, float(np.linalg.norm(at)) / math.sqrt(at.size)) / length
                up, down = list(points), list(points)
                up[i], down[i] = at + h * direction, at - h * direction
                return (call(up) - call(down)) / (2 * h)

            path = paths[checked[i]]
            findings.append(_leaf(path, grad, slope, largest, bound, directions, coordinates, rng))
    return sorted(findings, key=lambda f: -(f.difference or 0.0))


def _leaf(
    path: str,
    grad: np.ndarray,
    slope: Any,
    largest: float,
    bound: float,
    directions: int,
    coordinates: int,
    rng: np.random.Generator,
) -> Finding:
    if not np.all(np.isfinite(grad)):
        first = [int(i) for i in np.argwhere(~np.isfinite(grad))[0]]
        meaning = f"the gradient is not finite, first at {first}"
        return Finding(path, "broken", math.inf, bound, meaning)
    drawn = [rng.normal(size=grad.shape) for _ in range(directions)]
    slopes = np.array([slope(d) for d in drawn])
    gaps = slopes - [np.vdot(grad, d) for d in drawn]
    error = math.sqrt(float(np.mean(gaps**2)))
    size = max(float(np.linalg.norm(grad)), math.sqrt(float(np.mean(slopes**2))), _FLOOR * largest)
    flat = np.abs(grad).ravel()
    count = min(coordinates, flat.size)
    picked = {
        *np.argsort(flat)[-count:].tolist(),
        *rng.choice(flat.size, count, replace=False).tolist(),
    }
    worst, worst_gap, worst_slope = 0, -1.0, 0.0
    for index in sorted(picked):
        unit = np.zeros(grad.size)
        unit[index] = 1.0
        found = slope(unit.reshape(grad.shape))
        gap = abs(found - float(grad.ravel()[index]))
        if not gap <= worst_gap:
            worst, worst_gap, worst_slope = index, gap, found
    difference = float(max(error, worst_gap) / size) if size > 0 else 0.0
    if math.isnan(difference):
        return Finding(path, "broken", math.inf, bound, "the loss is not finite near these params")
    if difference <= bound:
        return Finding(path, "held", difference, bound, "the gradient is the loss's slope")
    where = [int(i) for i in np.unravel_index(worst, grad.shape)]
    meaning = (
        f"at {where} the gradient says {float(grad.ravel()[worst]):.6g}, the loss's slope is "
        f"{worst_slope:.6g}: look for a wrong custom_vjp or custom_jvp, a stop_gradient or a "
        "rounding (round, sign, argmax) between this parameter and the loss; a kink right at "
        "these params shows like this too"
    )
    return Finding(path, "broken", difference, bound, meaning)
