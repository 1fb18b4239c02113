"""What one chip computes and moves, against XLA's own analysis and against arithmetic."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from fnml.plan._hlo import parse
from fnml.plan._traffic import work


def compiled(function, *shapes, dtype=jnp.float32):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(s, dtype) for s in shapes)).compile()


def done(program):
    return work(parse(program.as_text()))


def flops(program):
    return sum(done(program).flops.values())


PRODUCTS = {
    "matrix": (lambda a, b: a @ b, (32, 48), (48, 64)),
    "batched": (lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 8, 16), (4, 16, 32)),
    "convolution": (
        lambda a, b: lax.conv_general_dilated(
            a, b, (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        (2, 9, 8, 3),
        (3, 3, 3, 5),
    ),
    "dilated": (
        lambda a, b: lax.conv_general_dilated(a, b, (1,), [(2, 3)], (2,), (3,)),
        (2, 4, 10),
        (6, 4, 3),
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_flops_are_those_of_xlas_analysis_where_there_is_no_loop(name):
    function, *shapes = PRODUCTS[name]
    program = compiled(function, *shapes)
    assert flops(program) == program.cost_analysis()["flops"] > 0


def test_a_loops_products_count_once_per_turn_where_xla_counts_them_once():
    def layers(x, w):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    program = compiled(layers, (16, 32), (7, 32, 32))
    assert flops(program) == 7 * 2 * 16 * 32 * 32
    assert program.cost_analysis()["flops"] < 2 * 2 * 16 * 32 * 32


def test_a_tpus_batched_product_counts_what_its_window_meets():
    # Eight heads and two parts of the width as a convolution's window, mostly over padding.
    line = (
        "  ROOT %c = bf16[64,8,128,1]{2,0,1,3} convolution(%x, %w), window={size=8x2 pad=7_7x0_0 "
        "rhs_reversal=1x0}, dim_labels=b1f0_0o1i->b0f1"
    )
    text = f"""ENTRY %main (x: bf16[64,2,128,1], w: bf16[8,128,2,128]) -> bf16[64,8,128,1] {{
  %x = bf16[64,2,128,1]{{2,1,0,3}} parameter(0)
  %w = bf16[8,128,2,128]{{3,2,1,0}} parameter(1)
{line}
}}"""
    assert work(parse(text)).flops == {"bf16": 2.0 * 64 * (2 * 128) * (8 * 128)}


def test_a_kernel_counts_what_it_states():
    text = """ENTRY %main (x: bf16[8]) -> bf16[8] {
  %x = bf16[8]{0} parameter(0)
  ROOT %k = bf16[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"AA","cost_estimate":{"flops":"300","transcendentals":"2","bytes_accessed":"70"}}}
}"""
    found = work(parse(text))
    assert (found.flops, found.bytes) == ({"bf16": 300.0}, 70.0)


def test_bytes_of_a_product_are_its_operands_and_its_result():
    a, b = (256, 512), (512, 128)
    program = compiled(lambda a, b: a @ b, a, b)
    assert done(program).bytes == 4 * (256 * 512 + 512 * 128 + 256 * 128)


def test_a_loop_reads_each_layer_once():
    layers, width = 12, 64

    def run(x, w):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    moved = done(compiled(run, (4, width), (layers, width, width))).bytes
    weights = 4 * layers * width * width
    # Each is read where it lies, at most once more to copy it out; not all of them in each turn.
    assert weights <= moved < 4 * weights


def test_what_the_backward_pass_reads_is_found_through_a_loop():
    layers, rows, width = 6, 128, 32

    def loss(x, w):
        return jnp.sum(lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0])

    shapes = ((rows, width), (layers, width, width))
    kept = done(compiled(jax.grad(loss, 1), *shapes)).kept
    one = 4 * rows * width
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    saved = jax.eval_shape(lambda x, w: jax.vjp(lambda w: loss(x, w), w)[1], *arguments)
    most = sum(leaf.size * 4 for leaf in jax.tree.leaves(saved))
    # Every layer's input has to be kept for its weights; JAX itself keeps more, and the weights.
    assert layers * one <= kept <= most
    assert done(compiled(loss, *shapes)).kept == 0


def test_in_main_memory_only():
    text = """ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %near = f32[8]{0:T(256)S(1)} negate(%x)
  ROOT %y = f32[8]{0} negate(%near)
}"""
    assert work(parse(text)).bytes == 32 + 32
