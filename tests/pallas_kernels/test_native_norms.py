"""rms_norm and layer_norm in C++: values and gradients, what they take, one result for any threads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fewer_threads import printed_with_one_and_two
from hypothesis import given, settings
from hypothesis import strategies as st

from fnml.pallas_kernels import layer_norm, native_faults, native_kernels, rms_norm

pytestmark = pytest.mark.skipif(bool(native_faults()), reason="; ".join(native_faults()))

# Each with the arrays it takes beside x: the scale, the bias and the residual, as there are any.
NORMS = {
    "rms_norm": lambda x, scale, residual, **options: rms_norm(x, scale, residual, **options),
    "layer_norm": lambda x, scale, residual, **options: layer_norm(
        x, scale, None, residual, **options
    ),
    "layer_norm with a bias": lambda x, scale, bias, residual, **options: layer_norm(
        x, scale, bias, residual, **options
    ),
}


def draw(name, shape, fused, seed=0):
    """Return x and what stands beside it, and the gradients of the results."""
    rng = np.random.default_rng(seed)
    x, residual, *grads = rng.normal(size=(4, *shape)) + 0.5
    vectors = rng.normal(size=(1 + ("bias" in name), shape[-1]))
    return [x, *vectors, residual if fused else None], grads[: 1 + fused]


def textbook(name, given_arrays, grads, eps):
    """Results and gradients in float64, by the formulas of the papers."""
    x, scale, *bias, residual = given_arrays
    total = x if residual is None else x + residual
    mean = 0.0 if name == "rms_norm" else total.mean(-1, keepdims=True)
    deviation = np.sqrt(((total - mean) ** 2).mean(-1, keepdims=True) + eps)
    unit = (total - mean) / deviation
    slope = grads[0] * scale
    to_unit = slope - unit * (slope * unit).mean(-1, keepdims=True)
    if name != "rms_norm":
        to_unit = to_unit - slope.mean(-1, keepdims=True)
    to_x = to_unit / deviation + sum(grads[1:])
    rows = tuple(range(x.ndim - 1))
    vectors = [(grads[0] * unit).sum(rows), *(grads[0].sum(rows) for _ in bias)]
    out = unit * scale + sum(bias)
    if residual is None:
        return [out], [to_x, *vectors]
    return [out, total], [to_x, *vectors, to_x]


def distance(found, expected):
    """Relative, or to the size of the standard normal inputs where the expected is smaller."""

    def one(x, y):
        x, y = (np.asarray(a).astype(np.float64) for a in (x, y))
        assert x.shape == y.shape
        return np.linalg.norm(x - y) / max(np.linalg.norm(y), y.size**0.5)

    return max(jax.tree.leaves(jax.tree.map(one, found, expected)))


def computed(name, given_arrays, grads, eps=1e-5, **options):
    def run(*arrays):
        out = NORMS[name](*arrays, eps=eps, **options)
        return out if isinstance(out, tuple) else (out,)

    arrays, grads = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (given_arrays, grads))
    out, back = jax.vjp(jax.jit(run), *arrays)
    return list(out), jax.tree.leaves(back(tuple(grads)))


@settings(max_examples=20, deadline=None)
@given(
    name=st.sampled_from(sorted(NORMS)),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 300)),
    fused=st.booleans(),
    seed=st.integers(0, 99),
)
def test_it_is_the_textbooks_in_float64_to_rounding(name, shape, fused, seed):
    arrays = draw(name, shape, fused, seed)
    # Numbers of a row that are almost equal lose digits in their differences: eps bounds the loss.
    found = computed(name, *arrays, eps=1e-1, implementation="native")
    # Sums of up to 300 products in float32.
    assert distance(found, textbook(name, *arrays, 1e-1)) < 2e-6


@pytest.mark.parametrize("name", NORMS)
# Three pieces of work and a rest; two rows to a piece, each wider than what is worth one.
@pytest.mark.parametrize("shape", [(1050, 48), (70, 16_401)])
def test_many_pieces_add_to_one_gradient_of_the_scale(name, shape):
    arrays = draw(name, shape, True)
    found = computed(name, *arrays, implementation="native")
    assert distance(found, textbook(name, *arrays, 1e-5)) < 2e-6


@pytest.mark.parametrize("name", NORMS)
def test_the_fused_sum_changes_no_bit(name):
    (x, *vectors, residual), _ = draw(name, (5, 37), True)
    x, *vectors, residual = (jnp.asarray(a, jnp.float32) for a in (x, *vectors, residual))
    out, total = NORMS[name](x, *vectors, residual, implementation="native")
    np.testing.assert_array_equal(total, x + residual)
    apart = NORMS[name](x + residual, *vectors, None, implementation="native")
    np.testing.assert_array_equal(out, apart)


@pytest.mark.parametrize("name", NORMS)
def test_a_nan_stays_in_its_row_and_is_not_swallowed(name):
    arrays, grads = draw(name, (3, 20), False)
    arrays[0][1, 19] = np.nan
    (out,), (grad_x, *vectors) = computed(name, arrays, grads, implementation="native")
    for x in (out, grad_x):
        assert np.isnan(x[1]).all() and np.isfinite(x[jnp.array([0, 2])]).all()
    assert np.isnan(vectors[0]).all()


def test_a_row_far_from_zero_keeps_its_digits():
    x = np.random.default_rng(0).normal(size=(4, 100)) + 1000
    x = np.float64(np.float32(x))
    found = layer_norm(jnp.asarray(x, jnp.float32), jnp.ones(100), implementation="native")
    want = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    # The mean of numbers about 1000 is known to 3e-5, and moves the whole row.
    assert distance(found, want) < 1e-4


@pytest.mark.parametrize("name", NORMS)
def test_auto_takes_it_in_the_scope_and_changes_nothing_outside(name):
    arrays, grads = draw(name, (3, 8), True)

    def program(**options):
        return str(jax.make_jaxpr(lambda a, g: computed(name, a, g, **options))(arrays, grads))

    arrays, grads = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (arrays, grads))
    before = program()
    with native_kernels():
        inside = program()
        assert "fnml_norm_forward" in inside and "fnml_norm_backward" in inside
        assert "fnml" not in program(implementation="lax")
    assert "fnml" not in before
    assert program() == before


def test_other_platforms_keep_their_bodies():
    x, scale = jnp.ones((4, 128)), jnp.ones(128)
    with native_kernels():
        traced = jax.jit(jax.grad(lambda x: rms_norm(x, scale).sum())).trace(x)
        assert "fnml_norm" in traced.lower().as_text()
        for platform in ("tpu", "cuda"):
            assert "fnml_norm" not in traced.lower(lowering_platforms=(platform,)).as_text()


def test_what_it_does_not_take_is_named():
    for x, reason in ((jnp.ones((2, 3), jnp.bfloat16), "float32"), (jnp.ones((0, 3)), "(0, 3)")):
        with pytest.raises(NotImplementedError) as caught:
            rms_norm(x, jnp.ones(3), implementation="native")
        assert reason in str(caught.value)
        with native_kernels():
            assert "fnml" not in str(jax.make_jaxpr(rms_norm)(x, jnp.ones(3)))


def test_a_scale_of_another_dtype_gets_its_gradient_in_it():
    x, scale, bias = jnp.ones((2, 5)), jnp.ones(5, jnp.bfloat16), jnp.ones(5, jnp.float16)

    def grads(implementation):
        def loss(x, scale, bias):
            return (layer_norm(x * x, scale, bias, implementation=implementation) ** 2).sum()

        return jax.grad(loss, (0, 1, 2))(x, scale, bias)

    found, want = grads("native"), grads("lax")
    assert [g.dtype for g in found] == [g.dtype for g in want]
    assert distance(found, want) < 1e-2


@pytest.mark.parametrize("name", NORMS)
def test_vmapped_it_is_the_lax_body(name):
    (x, *vectors, residual), _ = draw(name, (3, 4, 9), True)
    x, *vectors, residual = (jnp.asarray(a, jnp.float32) for a in (x, *vectors, residual))

    def loss(x, residual):
        return sum(out.sum() for out in NORMS[name](x, *vectors, residual))

    mapped = jax.jit(jax.vmap(jax.grad(loss, (0, 1))))
    expected = mapped(x, residual)
    with native_kernels():
        assert "fnml_norm" not in mapped.lower(x, residual).as_text()
        found = mapped(x, residual)
    assert distance(found, expected) < 1e-6


@pytest.mark.parametrize("name", NORMS)
def test_second_derivatives_are_those_of_the_lax_body(name):
    (x, *vectors, _), _ = draw(name, (3, 9), False)
    x, *vectors = (jnp.asarray(a, jnp.float32) for a in (x, *vectors))

    def slope(implementation, x):
        def loss(x):
            return (NORMS[name](x, *vectors, None, implementation=implementation) ** 3).sum()

        return (jax.grad(loss)(x) ** 2).sum()

    found, expected = (jax.grad(lambda x, n=n: slope(n, x))(x) for n in ("native", "lax"))
    assert distance(found, expected) < 1e-5


SCRIPT = """
import hashlib, jax, jax.numpy as jnp
from fnml.models import gelu, rotate, rotation, swiglu
from fnml.pallas_kernels import layer_norm, native_kernels, rms_norm
digest = hashlib.sha256()

def add(function, *shapes):
    arrays = [jnp.sin(jnp.arange(jnp.prod(jnp.array(s))).astype(float)).reshape(s) for s in shapes]
    out, back = jax.vjp(jax.jit(function), *arrays)
    for x in jax.tree.leaves((out, jax.jit(back)(out))):
        digest.update(bytes(memoryview(x)))

with native_kernels():
    for N, D in ((1050, 48), (2049, 131), (70, 16401)):
        add(rms_norm, (N, D), (D,), (N, D))
        add(layer_norm, (N, D), (D,), (D,), (N, D))
        add(swiglu, (N, D), (N, D))
        add(gelu, (N, D))
    add(lambda x: rotate(x, rotation(jnp.arange(130), 34)), (3, 130, 5, 34))
print(digest.hexdigest())
"""


def test_any_number_of_threads_gives_the_same_bits():
    one, two = printed_with_one_and_two(SCRIPT)
    assert one == two and len(one) == 64
