"""Control flow, running reductions, sorting and random numbers."""

import jax
import jax.numpy as jnp
import pytest
from exported import ops, same
from jax import lax

X = jax.random.normal(jax.random.key(0), (3, 4, 5))


def step(carry, a):
    return jnp.tanh(carry * 0.5 + a), (carry, a * 2)


@pytest.mark.parametrize("reverse", [False, True])
def test_scan_and_its_gradient(reverse: bool) -> None:
    def forward(x):
        return lax.scan(step, jnp.zeros((4, 5)), x, reverse=reverse)

    def loss(x):
        carry, (first, second) = forward(x)
        return carry.sum() + (first**2).sum() + second.sum()

    model = same(forward, X)
    assert ops(model).count("Scan") == 1
    same(jax.grad(loss), X)
    assert "Scan" not in ops(same(forward, X, unroll=3, importer=False))


def test_scan_over_nothing_and_of_a_symbolic_length() -> None:
    def forward(x):
        halved, before = lax.scan(lambda c, _: (c * 0.5, c), x, length=4)
        return halved, before, lax.scan(lambda c, a: (c + a, c * a), jnp.zeros(x.shape[1:]), x)

    same(forward, X, dynamic="L, ...")


def test_a_scan_sees_what_is_around_it() -> None:
    def forward(x, scale):
        table = jnp.cumsum(scale)
        return lax.scan(lambda c, a: (c + a @ table, table * c.sum()), jnp.zeros(4), x)

    same(forward, X, jnp.arange(5.0))


def test_while() -> None:
    def forward(x, n):
        counted = lax.fori_loop(0, n, lambda i, c: c + i.astype(jnp.float32) * x, x)
        halved = lax.while_loop(
            lambda c: (c[0] ** 2).sum() > 1.0, lambda c: (c[0] / 2, c[1] + 1), (x, 0)
        )
        never = lax.while_loop(lambda c: c.sum() > 1e9, lambda c: c + 1, x)
        return counted, halved, never

    assert ops(same(forward, X, jnp.int32(4))).count("Loop") == 3
    same(forward, X, jnp.int32(0), importer=False)


@pytest.mark.parametrize("which", [0, 2, 3, 7])
def test_cond_and_switch(which: int) -> None:
    def forward(i, x):
        branches = [lambda x: x, lambda x: x + 1, jnp.sin, jnp.zeros_like]
        picked = lax.switch(i, branches, x)
        return picked, lax.cond(i > 2, lambda x, y: (x, y), lambda x, y: (y * 2, x), x, picked)

    same(forward, jnp.int32(which), X, importer=which == 3)


def test_gradient_of_cond() -> None:
    def loss(x, b):
        return lax.cond(b, lambda x: (x**2).sum(), lambda x: jnp.exp(x).sum(), x)

    same(jax.grad(loss), X, jnp.bool_(True))


def test_control_flow_nests() -> None:
    def forward(x):
        def body(carry, a):
            inner = lax.while_loop(lambda v: v.sum() < 3.0, lambda v: v + jnp.abs(a), carry)
            out = lax.cond(a.sum() > 0, lambda v: v * 0.1, lambda v: v - a, inner)
            return out, lax.scan(lambda c, b: (c + b, c), 0.0, out)[1]

        return lax.scan(body, jnp.zeros(5), x[0])

    same(forward, X)


def test_wrappers_are_written_as_what_they_wrap() -> None:
    @jax.custom_jvp
    def twice(x):
        return x * 2

    twice.defjvp(lambda primals, tangents: (twice(*primals), tangents[0] * 3))

    def forward(x):
        return jax.checkpoint(jnp.sin)(x) + twice(x), jax.jit(jnp.exp)(x), lax.stop_gradient(x)

    same(forward, X)
    same(jax.grad(lambda x: forward(x)[0].sum()), X)


def test_the_form_for_every_platform_is_written() -> None:
    def forward(x):
        return lax.platform_dependent(x, tpu=lambda x: x + 5, default=lambda x: x * 2)

    assert ops(same(forward, X)) == ["Mul"]


@pytest.mark.parametrize("reverse", [False, True])
def test_running_reductions(reverse: bool) -> None:
    names = ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
    same(lambda x: [getattr(lax, name)(x, axis=1, reverse=reverse) for name in names], X)


def test_reductions() -> None:
    def everything(x):
        plain = [x.sum(1), x.prod(0), x.max((0, 2)), x.min(), x.mean(), x.std(1)]
        found = [jnp.argmax(x, 1), jnp.argmin(x, 0), jnp.argmax(jnp.round(x), 2)]
        own = lax.reduce(x, jnp.float32(2), lax.mul, (0,))
        whole = (x * 9).astype(jnp.int32)
        return (
            plain,
            found,
            own,
            jax.nn.logsumexp(x, axis=1),
            whole.sum(0),
            whole.max(1),
            whole.prod(),
        )

    same(everything, X)


def test_sorting_keeps_the_order_of_equals() -> None:
    def everything(x):
        # Without -0, which JAX takes for less than 0 and onnxruntime for the same.
        rough, places = (
            jnp.round(x).astype(jnp.int32).astype(jnp.float32),
            jnp.arange(60).reshape(3, 4, 5),
        )
        several = lax.sort((rough, -rough, places), dimension=1, num_keys=2)
        back = jnp.sort(x, axis=0, descending=True)
        most = lax.top_k(rough, 3)
        return several, jnp.argsort(rough, axis=2), back, most, jnp.median(x, axis=1)

    same(everything, X)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint32", "bool", "float16"])
def test_sorting_of_every_dtype(dtype: str) -> None:
    x = jnp.array([3.0, 0.0, 7.0, 100.0, 7.0])
    x = (x * (2.0**25 if dtype == "uint32" else 1.0)).astype(dtype)
    same(lambda x: (jnp.sort(x), jnp.argsort(x), lax.top_k(x, 2)), x)


def test_random_numbers_are_those_of_jax() -> None:
    def everything(key):
        uniform = jax.random.uniform(key, (2, 3))
        kept = jax.random.bernoulli(key, 0.3, (5,))
        return jax.random.split(key, 3)[1], uniform, kept, jax.random.normal(key, (3,))

    same(everything, jax.random.key(3))


def test_keys_are_arrays_like_others() -> None:
    def everything(key, seed):
        keys = jax.random.split(jax.random.fold_in(key, 5), 4).reshape(2, 2)
        drawn = jax.vmap(lambda k: jax.random.bits(k, (2,)))(keys[:, 0])
        picked = jax.random.bits(jnp.where(seed > 3, keys[0, 1], keys[1, 0]))
        counted = lax.scan(
            lambda k, _: (jax.random.fold_in(k, 1), jax.random.bits(k)), key, length=2
        )
        return keys, drawn, picked, counted, jax.random.bits(jax.random.key(seed))

    same(everything, jax.random.key(3), jnp.int32(7))
