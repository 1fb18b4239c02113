"""Counts against XLA's own analysis, and loops against their unrolled form."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from fnml.core import ConfigError, abstract
from fnml.models import CNNConfig, GPTConfig, MLPConfig, cnn, gpt, mlp
from fnml.pallas_kernels import attention
from fnml.train import next_token
from fnml.transforms import cost


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def perceptron():
    model = mlp(MLPConfig(inputs=256, hidden=(256, 256), outputs=10))
    return lambda p, x: jnp.sum(model.apply(p, x) ** 2), (abstract(model.spec), shape(128, 256))


def convolutions():
    # Which of its forms runs depends on the platform; this one is the same on all.
    model = cnn(CNNConfig(classes=10, channels=1, widths=(16, 32), form="xla"))
    state = abstract(model.state)

    def loss(p, x, state):
        return jnp.sum(model.apply(p, x, state=state, train=True)[0] ** 2)

    return loss, (abstract(model.spec), shape(16, 28, 28, 1), state)


def transformer():
    model = gpt(GPTConfig(width=128, layers=2, heads=4, context=64))

    def loss(p, tokens):
        return next_token(model.apply(p, tokens[:, :-1]), tokens[:, 1:]).value

    return loss, (abstract(model.spec), shape(4, 65, dtype=jnp.int32))


@pytest.mark.parametrize("make", [perceptron, convolutions, transformer])
@pytest.mark.parametrize("gradient", [False, True])
def test_flops_agree_with_xla_within_one_percent(make, gradient):
    loss, args = make()
    function = jax.value_and_grad(loss) if gradient else loss
    found = cost(function, *args)
    theirs = jax.jit(function).lower(*args).cost_analysis()
    assert found.total.flops == pytest.approx(theirs["flops"], rel=0.01)
    assert found.total.transcendentals == pytest.approx(theirs["transcendentals"], rel=0.01)
    assert 0.9 < found.total.products / found.total.flops < 1


@pytest.mark.parametrize(
    ("window", "strides", "padding", "dilations"),
    [
        ((3, 3), (1, 1), "SAME", ((1, 1), (1, 1))),
        ((3, 2), (2, 1), "VALID", ((1, 1), (2, 1))),
        ((2, 3), (1, 2), ((1, 2), (0, 3)), ((2, 3), (1, 2))),
    ],
)
def test_convolutions_are_counted_exactly(window, strides, padding, dilations):
    def f(x, w):
        return lax.conv_general_dilated(
            x,
            w,
            strides,
            padding,
            *dilations,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=2,
        )

    args = shape(2, 9, 8, 6), shape(*window, 3, 4)
    theirs = jax.jit(f).lower(*args).cost_analysis()
    assert cost(f, *args).total.flops == theirs["flops"]


def test_a_loop_counts_once_per_turn_and_xla_counts_it_once():
    def f(ws, x, unroll):
        return lax.scan(lambda x, w: (x @ w, None), x, ws, unroll=unroll)[0]

    args = shape(5, 64, 64), shape(32, 64)
    exact = 5 * 2 * 32 * 64 * 64
    for unroll in (1, 5):
        assert cost(f, *args, unroll=unroll).total.flops == exact
    once = jax.jit(lambda ws, x: f(ws, x, 1)).lower(*args).cost_analysis()["flops"]
    assert once == pytest.approx(exact / 5, rel=0.01)


def test_blocks_have_names_and_sum_to_the_total():
    def f(x, w):
        with jax.named_scope("first"):
            y = x @ w
        with jax.named_scope("second"):
            return y @ y

    found = cost(f, shape(8, 16), shape(16, 8))
    assert {b.name: b.flops for b in found.blocks} == {"first": 2048.0, "second": 1024.0}
    assert found.total.flops == 3072 and found.total.intensity > 0
    # x and w are alive with y; then y with the result.
    assert (found.arguments, found.peak) == (1024, 1024 + 2 * 256)
    assert [str(c.header) for c in found.table().columns][:2] == ["block", "GFLOP"]


def test_of_branches_the_dearest_counts_and_a_while_is_marked():
    def f(x):
        x = lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)
        return lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ x, x)

    found = cost(f, shape(16, 16))
    assert found.total.products == 3 * 2 * 16**3 and found.unbounded
    assert "one turn" in found.table().caption
    assert not cost(lambda x: x @ x, shape(16, 16)).unbounded


def test_of_branches_by_platform_the_one_that_would_run_counts():
    def f(x):
        return lax.platform_dependent(
            x, cpu=lambda x: x @ x, tpu=lambda x: x @ x @ x, default=lambda x: x + 1
        )

    def products(function, platform=None):
        return cost(function, shape(4, 4), platform=platform).total.products / (2 * 4**3)

    every = {"cpu": 1, "tpu": 2, "cuda": 0, "rocm": 0, "other": 0, None: 1}
    assert {p: products(f, p) for p in every} == every
    # Backward each product is two more, in a second choice by the index computed forward.
    gradient = jax.grad(lambda x: f(x).sum())
    assert [products(gradient, p) for p in ("cpu", "tpu", "cuda")] == [3, 6, 0]
    only = functools.partial(lax.platform_dependent, tpu=lambda x: x @ x, cuda=lambda x: x)
    assert products(only, "cpu") == 1, "none is for a CPU: the dearest"
    with pytest.raises(ConfigError, match=r"platform='cdua'.* Did you mean 'cuda'"):
        products(f, "cdua")


def test_elsewhere_than_on_a_cpu_convolutions_count_in_their_plain_form():
    def products(form, platform):
        model = cnn(CNNConfig(classes=10, channels=1, widths=(16, 32), form=form))
        state = abstract(model.state)

        def loss(p, x):
            return jnp.sum(model.apply(p, x, state=state, train=True)[0] ** 2)

        args = abstract(model.spec), shape(4, 28, 28, 1)
        return cost(jax.grad(loss), *args, platform=platform).total.products

    assert products("auto", "cuda") == products("auto", "other") == products("xla", "cpu") > 0


def test_a_kernel_counts_as_it_states_or_as_the_form_beside_it():
    B, T, H, D = 1, 512, 2, 64
    q = shape(B, T, H, D, dtype=jnp.bfloat16)

    def found(platform, **options):
        return cost(lambda q: attention(q, q, q, causal=True, **options), q, platform=platform)

    pairs = H * T * (T + 1) / 2
    assert found("tpu").total.products == 2 * 2 * D * pairs
    assert found("tpu").total.bytes < found("cpu").total.bytes / 5
    # Kernels for GPUs, and foreign functions, do not state what they compute.
    for platform in ("cuda", "cpu"):
        beside = found(platform, implementation="lax").total
        assert found(platform).total.products == beside.products > 0


def test_what_nothing_depends_on_is_not_counted():
    def f(x):
        _ = x @ x
        return x + 1

    assert cost(f, shape(8, 8)).total.flops == 64


def test_memory_is_near_what_xla_plans_without_convolutions():
    loss, args = transformer()
    for function in (loss, jax.value_and_grad(loss)):
        plan = jax.jit(function).lower(*args).compile().memory_analysis()
        theirs = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
        assert 0.7 < cost(function, *args).peak / theirs < 1.5
