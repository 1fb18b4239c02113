"""Look for the usual faults in a user's loss, and name each with its place."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnml.core import ConfigError, FnmlError, Metrics, leaf_names, nearest
from fnml.laws._call import LossFn, check_signature, on_device
from fnml.laws._check_grad import check_grad
from fnml.laws._check_laws import guarded, prepared, weight_law
from fnml.laws._finding import Finding
from fnml.laws._structure import broadcasts, constants, dtypes, key_use, unused
from fnml.transforms import Policy, autocast, find_nonfinite, mixed_precision
from fnml.transforms._sites import source
from fnml.transforms._walk import Rules, bodies, walk

PyTree = Any
# An activation this many times larger than all of parameters and batch has exploded.
_EXPLODED = 1e4


class Example(NamedTuple):
    """A loss with its example, traced."""

    loss_fn: LossFn
    params: PyTree
    batch: PyTree
    key: Any
    options: dict[str, Any]
    closed: Any
    raw: PyTree

    def call(self, params: PyTree, batch: PyTree, key: Any) -> tuple[jax.Array, Metrics]:
        """Call the loss with its options."""
        return self.loss_fn(params, batch, key, **self.options)

    @property
    def args(self) -> tuple[Any, ...]:
        return self.params, self.batch, self.key


def check_loss(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    key: jax.Array | None = None,
    *,
    allow: Sequence[str] = (),
    **options: Any,
) -> list[Finding]:
    """Look for faults in a loss that runs and trains, only not as well as it should.

    ==============  =============================================================================
    finite          loss and gradient are finite; else the operation, line, layer and parameter
    gradient        custom derivatives agree with finite differences in float64
    float16         loss stays finite in float16, by ``autocast`` and by ``mixed_precision``
    dead parameter  every parameter gets a gradient somewhere
    activations     no activation grows far beyond parameters and batch
    batch field     loss or metrics read every array of the batch
    broadcast       no ``[B]`` against ``[B, 1]`` makes ``[B, B]``
    key             a key that is given is used, and none twice
    dtypes          no float64, no integer that wraps or gets no gradient, no narrow loss
    constants       no large array is baked into the program
    weight          the loss is a mean over ``metrics.weight``
    ==============  =============================================================================

    Args:
      loss_fn: ``loss_fn(params, batch, key, **options) -> (loss, metrics)``.
      params: parameters, as a run starts with.
      batch: a batch as the run will have it, so that its dtypes are seen.
      key: a typed key for a loss that draws.
      allow: names of faults that are meant to be there.
      **options: keywords of the loss, such as a model's ``state``.

    Returns:
      A finding for each of these, in this order.

    Raises:
      ConfigError: the loss does not fit its contract, or ``allow`` names no check.

    >>> from fnml.core import Mean, Metrics
    >>> def loss_fn(params, batch, key):
    ...     error = Mean.of((batch["x"] - params["w"]) ** 2)
    ...     return error.value, Metrics(error.weight)
    >>> batch = {"x": np.ones(4, np.float32), "y": np.ones(4, np.float32)}
    >>> found = check_loss(loss_fn, {"w": jnp.float32(0.5)}, batch)
    >>> [(f.law, f.meaning.split(":")[0]) for f in found if f.status == "broken"]
    [('batch field', 'y')]
    """
    checks: dict[str, Callable[[Example], Finding]] = {
        "finite": _finite,
        "gradient": _gradient,
        "float16": _float16,
        "dead parameter": _dead,
        "activations": _activations,
        "batch field": lambda e: unused(e.closed, e.params, e.batch),
        "broadcast": lambda e: broadcasts(e.closed, e.params, e.batch),
        "key": lambda e: key_use(e.call, e.closed, e.params, e.batch, e.key),
        "dtypes": lambda e: dtypes(e.closed, e.params, e.raw),
        "constants": lambda e: constants(e.closed),
        "weight": _weight,
    }
    for name in allow:
        if name not in checks:
            hint = nearest(name, checks)
            raise ConfigError(f"allow={name!r}: there are {', '.join(checks)}.{hint}")
    raw = batch
    params, batch = on_device((params, batch))
    closed = check_signature(loss_fn, params, batch, key, **options)
    example = Example(loss_fn, params, batch, key, options, closed, raw)
    findings: list[Finding] = []
    for name, check in checks.items():
        if name in allow:
            findings.append(Finding(name, "not applicable", None, None, "allowed"))
            continue
        if findings and findings[0].status == "broken" and name in _NEED_FINITE:
            meaning = "has to wait until loss and gradient are finite"
            findings.append(Finding(name, "not applicable", None, None, meaning))
            continue
        findings.append(check(example))
    return findings


_NEED_FINITE = ("gradient", "float16", "dead parameter", "activations", "weight")


def _grad(example: Example) -> Callable[..., Any]:
    return jax.value_and_grad(example.call, has_aux=True, allow_int=True)


def _finite(example: Example) -> Finding:
    found = find_nonfinite(_grad(example), *example.args)
    if found is None:
        return Finding("finite", "held", None, None, "loss and gradient are finite")
    return Finding("finite", "broken", None, None, str(found))


def _gradient(example: Example) -> Finding:
    worst = check_grad(
        example.loss_fn,
        *example.args,
        directions=3,
        coordinates=2,
        **example.options,
    )[0]
    held = "the gradient is the loss's slope"
    meaning = held if worst.status == "held" else f"{worst.law}: {worst.meaning}"
    return worst._replace(law="gradient", meaning=meaning)


def _float16(example: Example) -> Finding:
    ways: dict[str, Callable[..., Any]] = {
        "autocast": autocast(example.call, "float16"),
        "mixed_precision": mixed_precision(example.call, Policy(compute="float16")),
    }
    wide = any(x.dtype != jnp.float32 for x in jax.tree.leaves(example.params))
    for name, narrow in ways.items():
        if name == "mixed_precision" and wide:
            continue
        try:
            with warnings.catch_warnings():
                # A literal beyond float16 is part of what is looked for.
                warnings.simplefilter("ignore", RuntimeWarning)
                found = find_nonfinite(lambda *args, f=narrow: f(*args)[0], *example.args)
        except (TypeError, ValueError, FnmlError):
            # A loss that fixes its dtypes cannot be cast from outside.
            continue
        if found is not None:
            meaning = f"{name} to float16 overflows, float32 does not: {found}"
            return Finding("float16", "broken", None, None, meaning)
    return Finding("float16", "held", None, None, "stays finite in float16")


def _dead(example: Example) -> Finding:
    grad_fn = jax.jit(_grad(example))
    names = leaf_names(example.params)
    leaves, tree = jax.tree.flatten(example.params)
    rng = np.random.default_rng(0)

    def moved(x: jax.Array) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        wide = np.asarray(x, np.float64)
        noise = rng.normal(size=x.shape) * (0.1 + 0.1 * np.std(wide))
        return jnp.asarray(wide + noise, x.dtype)

    # Zero at the start may be the start's fault: an initial scale of 0 hides what is behind it.
    points = [example.params, jax.tree.unflatten(tree, [moved(x) for x in leaves])]
    grads = [
        [np.asarray(g) for g in jax.tree.leaves(grad_fn(p, example.batch, example.key)[1])]
        for p in points
    ]
    dead = [
        name
        for name, x, *gs in zip(names, leaves, *grads, strict=True)
        if jnp.issubdtype(x.dtype, jnp.floating) and not any(np.any(g) for g in gs)
    ]
    if not dead:
        return Finding("dead parameter", "held", None, None, "every parameter gets a gradient")
    listed = ", ".join(name or "params" for name in dead[:6])
    meaning = (
        f"{listed}: the gradient is exactly 0: never used, behind a stop_gradient or a rounding, "
        "or its units are dead"
    )
    return Finding("dead parameter", "broken", None, None, meaning)


def _activations(example: Example) -> Finding:
    places: dict[str, Any] = {}

    def observe(site: Any, eqn: Any, results: list[Any]) -> dict[str, Any]:
        seen = {}
        for k, x in enumerate(() if bodies(eqn) else results):
            if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating) and x.size:
                name = "/".join(map(str, (*site, k)))
                places[name] = eqn
                # Masks are large and negative, activations that explode grow upwards too.
                seen[name] = jnp.max(x).astype(jnp.float32)
        return seen

    flat = jax.tree.leaves(example.args)
    run = jax.jit(lambda *xs: walk(example.closed, list(xs), Rules(observe=observe))[1])
    seen = {name: np.asarray(x) for name, x in run(*flat).items()}
    sizes = [1.0]
    for x in jax.tree.leaves((example.params, example.batch)):
        if jnp.issubdtype(x.dtype, jnp.number) and x.size:
            sizes.append(float(np.max(np.abs(np.asarray(x, np.float64)))))
    limit = _EXPLODED * max(sizes)
    for name in sorted(seen, key=lambda n: [int(i) for i in n.split("/")]):
        over = np.argwhere(np.nan_to_num(seen[name], nan=0.0) > limit)
        if len(over) and not _constant(places[name]):
            eqn, layer = places[name], [int(i) for i in over[0]]
            where = f" in layer {layer[0]}" if layer else ""
            meaning = (
                f"{eqn.primitive.name} at {source(eqn)} reaches {np.max(seen[name]):.3g}{where}, "
                f"parameters and batch {max(sizes):.3g}: normalise, or scale the initial values"
            )
            return Finding("activations", "broken", None, None, meaning)
    meaning = f"none exceeds {_EXPLODED:g} times parameters and batch"
    return Finding("activations", "held", None, None, meaning)


def _constant(eqn: Any) -> bool:
    """Tell whether an equation only lays out what it was given."""
    moves = ("broadcast_in_dim", "select_n", "convert_element_type", "bitcast_convert_type", "iota")
    return eqn.primitive.name in moves


def _weight(example: Example) -> Finding:
    case, _ = prepared(
        example.loss_fn,
        example.params,
        example.batch,
        jax.random.key(0) if example.key is None else example.key,
        example.options,
    )
    return guarded("weight", weight_law, case)
