import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnml.core import ShapeError
from fnml.models import rope, rotate, rotation

X = np.random.default_rng(0).normal(size=(2, 5, 3, 8))


def _complex_form(x, positions, base):
    """Turn each pair as one complex number, in float64."""
    half = x.shape[-1] // 2
    z = x[..., :half] + 1j * x[..., half:]
    angles = positions[..., None] * base ** (-np.arange(half) / half)
    z = z * np.exp(1j * angles)[..., None, :]
    return np.concatenate([z.real, z.imag], -1)


@pytest.mark.parametrize(
    "positions", [np.arange(5), np.array([[0, 1, 2, 3, 4], [7, 8, 9, 30, 31]])]
)
def test_rope_equals_the_complex_form(positions):
    got = rope(jnp.asarray(X, jnp.float32), jnp.asarray(positions), base=100.0)
    np.testing.assert_allclose(got, _complex_form(X, positions, 100.0), rtol=1e-4, atol=1e-5)


def test_scores_depend_on_the_distance_only_and_norms_stay():
    x = jnp.asarray(X, jnp.float32)
    near, far = (rope(x, jnp.arange(5) + shift) for shift in (0, 40))

    def scores(x):
        return jnp.einsum("bthd,bshd->bhts", x, x)

    np.testing.assert_allclose(scores(near), scores(far), rtol=1e-3, atol=1e-4)
    assert np.abs(scores(near) - scores(x)).max() > 0.1
    norms = [np.linalg.norm(np.asarray(a), axis=-1) for a in (near, x)]
    np.testing.assert_allclose(*norms, rtol=1e-5)


def test_the_gradient_is_the_opposite_rotation():
    x, grad = jnp.asarray(X, jnp.float32), jnp.asarray(X[::-1].copy(), jnp.float32)
    _, vjp = jax.vjp(lambda x: rope(x, jnp.arange(5)), x)
    np.testing.assert_allclose(vjp(grad)[0], rope(grad, -jnp.arange(5)), rtol=1e-4, atol=1e-5)


def test_bfloat16_stays_and_misfits_are_named():
    assert rope(jnp.ones((1, 2, 1, 4), jnp.bfloat16), jnp.arange(2)).dtype == jnp.bfloat16
    with pytest.raises(ShapeError, match="even width"):
        rotation(jnp.arange(3), 5)
    with pytest.raises(ShapeError, match=r"here \[\.\.\., 5, 4\]"):
        rotate(jnp.ones((2, 5, 3, 8)), rotation(jnp.arange(4), 8))


def test_numpy_positions_are_constants_with_the_bits_of_the_program():
    def run(positions):
        return jax.jit(lambda: rotation(positions(), 8))

    constant, computed = run(lambda: np.arange(70)), run(lambda: jnp.arange(70))
    jax.tree.map(np.testing.assert_array_equal, constant(), computed())
    assert "cosine" in computed.lower().as_text()
    assert "cosine" not in constant.lower().as_text()


def test_a_constant_rotation_is_computed_by_one_program(caplog):
    with jax.log_compiles():
        jax.jit(lambda: rotation(np.arange(71), 8)).lower()
    compiled = [r.getMessage() for r in caplog.records if "Finished XLA" in r.getMessage()]
    assert len(compiled) == 1, compiled
