import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnml.core import init
from fnml.models import GPTConfig, gpt, gpt_cache, gpt_decode
from fnml.pallas_kernels import QuantizedMatrix
from fnml.transforms import adapt, lora, merge, quantize

CONFIG = GPTConfig(vocab=32, width=32, layers=2, heads=2, mlp_width=64, context=16)
ROOT = gpt(CONFIG)
PARAMS = init(ROOT.spec, jax.random.key(0))
TOKENS = jax.random.randint(jax.random.key(1), (2, 16), 0, 32)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_fused_model_computes_the_same(bits, zero_point, tied):
    root = gpt(GPTConfig(**{**CONFIG.__dict__, "tied": tied}))
    options = {"bits": bits, "group": 16, "zero_point": zero_point}
    plain, fused = quantize(root, **options), quantize(root, **options, fused=True)
    params = adapt(fused, {name: PARAMS[name] for name in root.spec})
    got = jax.jit(fused.apply)(params, TOKENS)
    want = jax.jit(plain.apply)(params, TOKENS)
    assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)
    jax.tree.map(np.testing.assert_array_equal, merge(fused, params), merge(plain, params))
    assert jax.tree.structure(fused.spec) == jax.tree.structure(plain.spec)


def test_no_linear_layer_sees_a_whole_matrix_as_numbers():
    # 512 x 2,048 numbers are 4 MiB a matrix, two blocks of the product.
    config = GPTConfig(vocab=8, width=512, layers=1, heads=4, mlp_width=2048, context=1)
    root = gpt(config)

    def shapes(fused):
        model = quantize(root, targets="layers/mlp/*", fused=fused)
        params = jax.eval_shape(lambda: init(model.spec, jax.random.key(0)))
        return str(jax.make_jaxpr(model.apply)(params, jax.ShapeDtypeStruct((1, 1), jnp.int32)))

    assert "f32[1,512,2048]" in shapes(fused=False)
    assert "f32[512,2048]" not in shapes(fused=True)
    assert "f32[1,512,2048]" not in shapes(fused=True)


def test_gradients_of_the_other_parameters_are_those_of_the_plain_model():
    options = {"targets": "layers/mlp/*"}
    plain, fused = quantize(ROOT, **options), quantize(ROOT, **options, fused=True)
    params = adapt(plain, PARAMS)

    def slopes(model):
        def loss(table):
            logits = model.apply({**params, "embed": {"table": table}}, TOKENS)
            return jnp.sum(jnp.sin(logits))

        return jax.jit(jax.grad(loss))(params["embed"]["table"])

    got, want = slopes(fused), slopes(plain)
    assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)


def test_edits_around_it_see_whole_weights():
    base = quantize(ROOT, bits=4, fused=True)
    tuned = lora(base, rank=2)
    params = adapt(tuned, PARAMS, jax.random.key(1))
    got = tuned.apply(params, TOKENS)
    want = base.apply(adapt(base, PARAMS), TOKENS)
    assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)


def test_decoding_multiplies_with_codes_too():
    model = quantize(ROOT, fused=True)
    params = adapt(model, PARAMS)
    logits, _ = gpt_decode(CONFIG)(
        model.apply.lazy(params, None), gpt_cache(CONFIG, 2, 16), TOKENS, 0
    )
    want = model.apply(params, TOKENS)
    assert np.linalg.norm(logits - want) < 1e-5 * np.linalg.norm(want)


def test_a_stand_in_becomes_an_array_wherever_one_is_needed():
    model = quantize(ROOT, bits=4, group=8)
    stored = adapt(model, PARAMS)["layers"]["attention"]["query"]
    whole = merge(model, adapt(model, PARAMS))["layers"]["attention"]["query"]
    matrix = QuantizedMatrix(
        stored["codes"], stored["scale"], None, 4, (32, 2, 16), jnp.dtype("float32")
    )
    assert (matrix.shape, matrix.ndim, matrix.size) == (whole.shape, 4, whole.size)
    np.testing.assert_array_equal(jnp.sin(matrix), jnp.sin(whole))
    np.testing.assert_array_equal(matrix[1], whole[1])
    np.testing.assert_array_equal(matrix.at[0].get(), whole[0])
    np.testing.assert_array_equal(matrix.T, whole.T)
    np.testing.assert_array_equal(matrix.reshape(-1), whole.reshape(-1))
    assert matrix.astype(jnp.bfloat16).dtype == jnp.bfloat16
