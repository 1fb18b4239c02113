"""Why are rotary positions, softmax and AdamW no kernels? Because XLA runs them as fast as a copy.

Run: ``python benchmarks/left_to_xla.py``. Each is one pass over memory, so the floor is a copy of
as many bytes as it has to read and write. Shown are the time, the floor's, and their ratio: a hand
written kernel could win what the ratio is above 1, and would cut the fusion with its neighbours.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich import print
from rich.table import Table
from turns import turns

from fnml.models import rotate, rotation


def problems() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...], int]]:
    """Return each function, its arguments, and the bytes that it has to read and write."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    heads, scores = draw(8, 1024, 16, 64), draw(4096, 2048)
    by = rotation(jnp.arange(1024), 64)
    params = {"w": draw(2048, 4096)}
    optimizer = optax.adamw(1e-3)
    state = optimizer.init(params)

    def update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return {
        "rotary, 8 x 1024 x 16 x 64": (lambda x: rotate(x, by), (heads,), 2 * heads.nbytes),
        "softmax, 4096 x 2048": (lambda x: jax.nn.softmax(x, -1), (scores,), 2 * scores.nbytes),
        # Reads the parameter, its gradient and two moments; writes all but the gradient.
        "AdamW, 8.4 million": (update, (params, state, params), 7 * params["w"].nbytes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    table = Table("operation", "ms", "copy of its bytes, ms", "ratio")
    for name, (function, arguments, size) in problems().items():
        source = jnp.zeros(size // 8, jnp.float32)
        run = jax.jit(function).lower(*arguments).compile()
        copy = jax.jit(lambda x: x + 1).lower(source).compile()

        def ours(run: Any = run, arguments: Any = arguments) -> Any:
            return run(*arguments)

        def floor(copy: Any = copy, source: Any = source) -> Any:
            return copy(source)

        times = turns({"ours": ours, "copy": floor}, options.rounds)
        pairs = zip(times["ours"], times["copy"], strict=True)
        table.add_row(
            name,
            f"{1e3 * statistics.median(times['ours']):.1f}",
            f"{1e3 * statistics.median(times['copy']):.1f}",
            f"{statistics.median([a / b for a, b in pairs]):.2f}",
        )
    print(table)


if __name__ == "__main__":
    main()
