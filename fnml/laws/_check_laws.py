"""Check the laws of the transforms on a user's own loss."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fnml.core import Metrics, State, shard_key
from fnml.laws._call import LossFn, check_signature, on_device
from fnml.laws._finding import Finding, bits, coarsest, distance
from fnml.train import train_step
from fnml.transforms import accumulate, data_parallel, fuse, pmap, remat

PyTree = Any


class _Case(NamedTuple):
    """A loss with its example; ``keyed`` is false if laws are checked without random draws."""

    loss_fn: LossFn
    params: PyTree
    batch: PyTree
    key: jax.Array
    options: dict[str, Any]
    bound: float
    keyed: bool
    parts: int
    devices: int

    def plain(self, params: PyTree, batch: PyTree, key: Any, **options: Any) -> Any:
        """Call the loss, without its key if it can do without."""
        return self.loss_fn(params, batch, key if self.keyed else None, **options)

    @property
    def grad_fn(self) -> Callable[..., Any]:
        return jax.value_and_grad(self.plain, has_aux=True)

    def run(self, grad_fn: Callable[..., Any]) -> Any:
        return jax.jit(grad_fn)(self.params, self.batch, self.key, **self.options)


def check_laws(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    key: jax.Array | None = None,
    **options: Any,
) -> list[Finding]:
    """Run the transforms' laws on one loss and one batch.

    ===============  ============================================================================
    purity           two traces of the loss give the same bits
    compilation      ``jit(loss_fn) == loss_fn`` up to rounding
    evaluation       without a key the loss runs and draws nothing
    weight           ``metrics.weight`` is positive, and the loss a mean over it: the parts of a
                     batch, weighted by it, merge to the whole
    accumulate       ``accumulate(g, n) == g``, for a loss that always draws the mean over shards
    remat            ``remat(f) == f`` with its gradient
    fuse             ``fuse(step, n)`` has the bits of ``n`` steps
    data_parallel    ``data_parallel(g, D)`` has the bits of ``accumulate(g, D)``
    pmap             ``pmap(g)`` has the bits of ``data_parallel(g)``
    ===============  ============================================================================

    Laws of the layout are checked without a key if the loss runs without one. The bound of what is
    up to rounding is 64 rounding units of the least precise float in the loss, and at most the
    square root of one.

    Args:
      loss_fn: ``loss_fn(params, batch, key, **options) -> (loss, metrics)``.
      params: any parameters.
      batch: a batch whose leading axis can be divided; with masks, use unequal ones: equal ones
        hide a wrong weight.
      key: a typed key, by default ``jax.random.key(0)``.
      **options: keywords of the loss, such as a model's ``state``.

    Returns:
      A finding for each law, in the order above.

    Raises:
      ConfigError: the loss does not fit its contract.

    >>> from fnml.core import Mean, Metrics
    >>> def loss_fn(params, batch, key):
    ...     error = Mean.of((batch - params) ** 2)
    ...     return error.value, Metrics(error.weight)
    >>> found = check_laws(loss_fn, jnp.float32(0.5), jnp.arange(4.0))
    >>> [finding.law for finding in found if finding.status == "broken"]
    []
    """
    case, evaluation = prepared(loss_fn, params, batch, key, options)
    laws = [
        ("purity", _purity),
        ("compilation", _compilation),
        ("evaluation", lambda case: evaluation),
        ("weight", weight_law),
        ("accumulate", _accumulate),
        ("remat", _remat),
        ("fuse", _fuse),
        ("data_parallel", _data_parallel),
        ("pmap", _pmap),
    ]
    return [guarded(name, law, case) for name, law in laws]


def prepared(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    key: jax.Array | None,
    options: dict[str, Any],
) -> tuple[_Case, Finding]:
    """Return the case, and whether the loss runs without a key."""
    params, batch = on_device((params, batch))
    key = jax.random.key(0) if key is None else key
    closed = check_signature(loss_fn, params, batch, key, **options)
    unit = coarsest(closed)
    evaluation = _evaluation(loss_fn, params, batch, options)
    case = _Case(
        loss_fn,
        params,
        batch,
        key,
        options,
        bound=min(64 * unit, unit**0.5),
        keyed=evaluation.status == "broken",
        parts=_parts(batch),
        devices=_devices(batch),
    )
    return case, evaluation


def guarded(name: str, law: Callable[[_Case], Finding], case: _Case) -> Finding:
    """Turn what a law raises into a finding: a loss that cannot be transformed breaks it."""
    try:
        return law(case)
    except Exception as error:  # noqa: BLE001 (whatever a user's loss raises is the finding)
        reason = str(error).strip().split("\n")[0]
        meaning = f"cannot be run: {type(error).__name__}: {reason}"
        return Finding(name, "broken", None, None, meaning)


def _parts(batch: PyTree) -> int:
    """Return into how many parts to divide the batch, 0 if it cannot be divided."""
    sizes = {x.shape[0] if x.ndim else 1 for x in jax.tree.leaves(batch)}
    size = sizes.pop() if len(sizes) == 1 else 1
    return next((n for n in (4, 2, *range(3, size + 1)) if size > 1 and size % n == 0), 0)


def _devices(batch: PyTree) -> int:
    sizes = {x.shape[0] if x.ndim else 1 for x in jax.tree.leaves(batch)}
    size = sizes.pop() if len(sizes) == 1 else 1
    return max(n for n in (1, 2, 4, 8) if n <= len(jax.devices()) and size % n == 0)


_UNDIVIDED = "the batch has no common leading axis of two or more to divide: give a larger one"


def _shards(case: _Case) -> list[PyTree]:
    def part(i: int) -> PyTree:
        return jax.tree.map(
            lambda x: x[i * x.shape[0] // case.parts : (i + 1) * x.shape[0] // case.parts],
            case.batch,
        )

    return [part(i) for i in range(case.parts)]


def _rounded(law: str, left: Any, right: Any, bound: float, held: str, broken: str) -> Finding:
    """Compare the loss, the metrics and the gradients of two results up to rounding."""
    difference = max(map(distance, _pieces(left), _pieces(right)))
    good = difference <= bound
    return Finding(law, "held" if good else "broken", difference, bound, held if good else broken)


def _pieces(result: Any) -> list[PyTree]:
    (loss, metrics), grads = result
    return [loss, (metrics.weight, metrics.values), metrics.stats, grads]


def _bitwise(law: str, left: Any, right: Any, bound: float, held: str, near: str) -> Finding:
    if bits(left) == bits(right):
        return Finding(law, "held", 0.0, 0.0, held)
    difference = distance(left, right)
    if difference <= bound:
        return Finding(law, "rounding", difference, bound, near)
    return Finding(law, "broken", difference, bound, "the results differ by more than rounding")


def _purity(case: _Case) -> Finding:
    # A compiled function would only repeat what its first trace found: each run traces anew.
    def trace() -> Any:
        return jax.jit(lambda p, b, k: case.loss_fn(p, b, k, **case.options))(
            case.params, case.batch, case.key
        )

    one, other = trace(), trace()
    if bits(one) == bits(other):
        return Finding("purity", "held", 0.0, 0.0, "the same arguments give the same bits")
    meaning = (
        "it reads or changes something outside its arguments (a counter, a global, NumPy's "
        "random numbers): runs cannot be resumed or compared; pass it as an argument or draw from "
        "the key"
    )
    return Finding("purity", "broken", distance(one, other), 0.0, meaning)


def _compilation(case: _Case) -> Finding:
    plain = case.loss_fn(case.params, case.batch, case.key, **case.options)
    compiled = jax.jit(lambda p, b, k: case.loss_fn(p, b, k, **case.options))(
        case.params, case.batch, case.key
    )
    return _rounded(
        "compilation",
        (compiled, ()),
        (plain, ()),
        case.bound,
        "the compiled loss is the loss",
        "the compiled loss is another: it depends on being traced, or is ill-conditioned",
    )


def _evaluation(loss_fn: LossFn, params: PyTree, batch: PyTree, options: dict[str, Any]) -> Finding:
    try:
        jax.eval_shape(lambda p, b: loss_fn(p, b, None, **options), params, batch)
    except Exception as error:  # noqa: BLE001 (whatever a user's loss raises is the finding)
        reason = str(error).strip().split("\n")[0]
        meaning = (
            f"loss_fn(params, batch, None) fails: {type(error).__name__}: {reason}. eval_step "
            "calls it without a key: no draws, no dropout"
        )
        return Finding("evaluation", "broken", None, None, meaning)
    meaning = "without a key it runs and draws nothing, as eval_step needs it"
    return Finding("evaluation", "held", None, None, meaning)


def weight_law(case: _Case) -> Finding:
    """Check that parts of the batch, weighted by ``metrics.weight``, merge to the whole."""
    loss_fn = jax.jit(case.plain)
    loss, metrics = loss_fn(case.params, case.batch, case.key, **case.options)
    weight = float(metrics.weight)
    if not (np.isfinite(weight) and weight > 0):
        meaning = f"metrics.weight is {weight:g}: it counts the examples or unmasked tokens"
        return Finding("weight", "broken", None, None, meaning)
    if case.keyed:
        meaning = "a loss that always draws cannot be compared with its parts"
        return Finding("weight", "not applicable", None, None, meaning)
    if not case.parts:
        return Finding("weight", "not applicable", None, None, _UNDIVIDED)
    parts = [loss_fn(case.params, part, case.key, **case.options) for part in _shards(case)]
    merged = jax.tree.map(lambda *xs: np.sum(np.asarray(xs, np.float64), 0), *[m for _, m in parts])
    weights = [float(m.weight) for _, m in parts]
    # A part in which nothing counts may have any loss, even NaN.
    total = sum(w * float(one) for w, (one, _) in zip(weights, parts, strict=True) if w)
    return _rounded(
        "weight",
        ((total / float(merged.weight), _without_stats(merged)), ()),
        ((loss, _without_stats(metrics)), ()),
        case.bound,
        f"the loss is a mean over metrics.weight: {case.parts} parts merge to the whole",
        f"{case.parts} parts of the batch, weighted by metrics.weight, do not merge to the whole: "
        "the weight is not what the loss was divided by (such as examples for a mean over unmasked "
        "tokens), or examples see each other (statistics of the batch, contrastive terms)",
    )


def _accumulate(case: _Case) -> Finding:
    if not case.parts:
        return Finding("accumulate", "not applicable", None, None, _UNDIVIDED)
    left = case.run(accumulate(case.grad_fn, case.parts))
    held = f"{case.parts} micro-batches give the gradient of the whole batch"
    if case.keyed:
        return _rounded(
            "accumulate",
            left,
            _mean_of_shards(case),
            case.bound,
            f"{case.parts} micro-batches give the weighted mean of their gradients",
            "the gradient is not the weighted mean of its shards'",
        )
    (loss, metrics), grads = left
    (whole, expected), right = case.run(case.grad_fn)
    return _rounded(
        "accumulate",
        ((loss, _without_stats(metrics)), grads),
        ((whole, _without_stats(expected)), right),
        case.bound,
        held,
        f"training with {case.parts} micro-batches follows another gradient than with one: see "
        "the weight",
    )


def _without_stats(metrics: Metrics) -> Metrics:
    """Leave out a model's statistics: each part of a batch has its own, of its own weight."""
    return Metrics(metrics.weight, metrics.values)


def _mean_of_shards(case: _Case) -> Any:
    compiled = jax.jit(case.grad_fn)
    results = [
        jax.device_get(compiled(case.params, part, shard_key(case.key, i), **case.options))
        for i, part in enumerate(_shards(case))
    ]
    metrics = jax.tree.map(
        lambda *xs: np.sum(np.asarray(xs, np.float64), 0), *[m for (_, m), _ in results]
    )
    weights = [float(m.weight) for (_, m), _ in results]

    def mean(*xs: Any) -> np.ndarray:
        weighed = [w * np.asarray(x, np.float64) for w, x in zip(weights, xs, strict=True) if w]
        return np.sum(weighed, 0) / metrics.weight

    loss = mean(*[one for (one, _), _ in results])
    return (loss, metrics), jax.tree.map(mean, *[grads for _, grads in results])


def _remat(case: _Case) -> Finding:
    grad_fn = jax.value_and_grad(remat(case.plain), has_aux=True)
    return _rounded(
        "remat",
        case.run(grad_fn),
        case.run(case.grad_fn),
        case.bound,
        "activations can be recomputed",
        "recomputing activations changes the gradient: an operation does not repeat itself",
    )


def _fuse(case: _Case) -> Finding:
    count, state = 2, case.options.get("state", ())
    others = {name: value for name, value in case.options.items() if name != "state"}
    grad_fn = jax.value_and_grad(functools.partial(case.plain, **others), has_aux=True)
    optimizer = optax.sgd(1e-3, momentum=0.9)
    step = train_step(grad_fn, optimizer)
    start = State.create(case.params, optimizer, case.key, state)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x[::-1] if x.ndim else x]), case.batch)
    fused, _ = jax.jit(fuse(step, count))(start, stacked)
    single, run = start, jax.jit(step)
    for i in range(count):
        single, _ = run(single, jax.tree.map(lambda x, i=i: x[i], stacked))
    return _bitwise(
        "fuse",
        (fused.params, fused.model_state),
        (single.params, single.model_state),
        case.bound,
        "several steps in one dispatch give the bits of single steps",
        "XLA computes an operation otherwise inside a loop (on CPU, convolution): fused and single "
        "steps agree up to rounding, so do not change the fused count in the middle of a run whose "
        "bits matter",
    )


def _data_parallel(case: _Case) -> Finding:
    if case.devices == 1:
        return _one_device("data_parallel")
    return _bitwise(
        "data_parallel",
        case.run(_parallel(case)),
        case.run(accumulate(case.grad_fn, case.devices)),
        case.bound,
        f"{case.devices} devices give the bits of {case.devices} micro-batches on one",
        "XLA computes an operation otherwise inside accumulate's loop than on a device: results "
        "agree up to rounding, but changing the number of devices changes the last bits",
    )


def _parallel(case: _Case) -> Callable[..., Any]:
    devices = jax.devices()[: case.devices]
    kind = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((case.devices,), ("data",), axis_types=kind, devices=devices)
    return data_parallel(case.grad_fn, mesh)


def _pmap(case: _Case) -> Finding:
    if case.devices == 1:
        return _one_device("pmap")
    mapped = pmap(case.grad_fn, jax.devices()[: case.devices])
    return _bitwise(
        "pmap",
        jax.device_get(mapped(case.params, case.batch, case.key, **case.options)),
        jax.device_get(case.run(_parallel(case))),
        case.bound,
        f"{case.devices} devices give the same bits through pmap",
        "pmap and data_parallel agree up to rounding",
    )


def _one_device(law: str) -> Finding:
    meaning = (
        "needs two devices that divide the batch; on a CPU set JAX_NUM_CPU_DEVICES=4 before JAX "
        "starts"
    )
    return Finding(law, "not applicable", None, None, meaning)
