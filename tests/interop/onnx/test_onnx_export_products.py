"""Products, convolutions and pooling, with their gradients."""

import jax
import jax.numpy as jnp
import pytest
from exported import ops, same
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

NHWC = ("NHWC", "HWIO", "NHWC")
IMAGE = jax.random.normal(jax.random.key(0), (2, 6, 7, 4))


def normal(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(sum(shape)), shape)


def conv(x, w, strides=(1, 1), padding="SAME", **options):
    return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=NHWC, **options)


def test_products_of_every_shape() -> None:
    pairs = {
        "ij,jk->ik": ((2, 3), (3, 4)),
        "i,i->": ((4,), (4,)),
        "i,j->ij": ((3,), (4,)),
        "ij,kj->ki": ((3, 4), (5, 4)),
        "bijk,bkil->bijl": ((2, 3, 4, 5), (2, 5, 3, 6)),
        "ijkl,lm->ijkm": ((2, 3, 4, 5), (5, 6)),
        "abij,abjk->abik": ((2, 3, 4, 5), (2, 3, 5, 4)),
        "btd,btf->df": ((2, 3, 4), (2, 3, 5)),
        "btkgd,bskd->bkgts": ((2, 3, 2, 2, 4), (2, 5, 2, 4)),
    }
    args = [(normal(*a), normal(*b)) for a, b in pairs.values()]
    same(lambda args: [jnp.einsum(e, *ab) for e, ab in zip(pairs, args, strict=True)], args)


def test_a_linear_layer_is_one_product() -> None:
    assert ops(same(lambda x, w: x @ w, normal(2, 3, 4), normal(4, 5))) == ["MatMul"]


def test_products_in_other_dtypes() -> None:
    def everything(a, b):
        wide = jnp.dot(
            a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), preferred_element_type="float32"
        )
        small = [(x * 9).astype(jnp.int8) for x in (a, b)]
        whole = [(x * 9).astype(jnp.int32) for x in (a, b)]
        return (
            wide,
            jnp.dot(*small, preferred_element_type="int32"),
            jnp.dot(*whole),
            jnp.dot(*small),
        )

    model = same(everything, normal(3, 4), normal(4, 5))
    assert ops(model).count("MatMulInteger") == 1


@st.composite
def products(draw):
    counts = [draw(st.integers(0, 2)) for _ in range(4)]
    sizes = [[draw(st.integers(1, 3)) for _ in range(n)] for n in counts]
    batch, over, free_a, free_b = sizes
    order_a = draw(st.permutations(range(len(batch + over + free_a))))
    order_b = draw(st.permutations(range(len(batch + over + free_b))))
    return batch, over, free_a, free_b, order_a, order_b


@settings(max_examples=15)
@given(products())
def test_every_product(case) -> None:
    batch, over, free_a, free_b, order_a, order_b = case
    shape_a, shape_b = [*batch, *over, *free_a], [*batch, *over, *free_b]
    n, m = len(batch), len(batch) + len(over)
    a = normal(*(shape_a[i] for i in order_a))
    b = normal(*(shape_b[i] for i in order_b))
    places = [[order.index(i) for i in range(m)] for order in (order_a, order_b)]
    numbers = ((places[0][n:], places[1][n:]), (places[0][:n], places[1][:n]))
    same(lambda a, b: lax.dot_general(a, b, numbers), a, b, importer=False)


KINDS = {
    "plain": {},
    "strided": {"strides": (2, 1), "padding": "VALID"},
    "dilated": {"padding": ((1, 2), (-1, 3)), "rhs_dilation": (2, 1)},
    "transposed": {"padding": ((1, 2), (0, 2)), "lhs_dilation": (2, 3)},
    "transposed, cropped": {"padding": ((1, 2), (0, 5)), "lhs_dilation": (2, 3)},
    "transposed, dilated": {
        "padding": ((1, 2), (0, 3)),
        "lhs_dilation": (2, 3),
        "rhs_dilation": (2, 2),
    },
    "transposed, strided": {"strides": (2, 2), "padding": ((1, 2), (0, 3)), "lhs_dilation": (2, 3)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_convolutions(kind: str) -> None:
    def both(x, w, grouped):
        groups = conv(x, grouped, **KINDS[kind], feature_group_count=2)
        return conv(x, w, **KINDS[kind]), groups

    same(both, IMAGE, normal(3, 3, 4, 5), normal(3, 3, 2, 6), importer="transposed" in kind)


def test_a_transposed_convolution_is_one_where_it_fits() -> None:
    model = same(lambda x, w: conv(x, w, **KINDS["transposed"]), IMAGE, normal(3, 3, 4, 5))
    assert "ConvTranspose" in ops(model) and "Pad" not in ops(model)


def test_convolutions_in_other_dimensions_and_dtypes() -> None:
    def everything(x, w):
        line = lax.conv_general_dilated(x, w, (1,), [(1, 1)])
        dense = lax.conv_general_dilated(x[..., 0], w[..., 0], (), [])
        half = conv(IMAGE.astype("bfloat16"), normal(3, 3, 4, 5).astype("bfloat16"))
        small = [(x * 9).astype("int8") for x in (IMAGE, normal(3, 3, 4, 5))]
        batched = conv(IMAGE, normal(3, 3, 4, 6), batch_group_count=2)
        cube = lax.conv_general_dilated(
            normal(1, 2, 3, 4, 5), normal(3, 2, 3, 2, 2), (1, 1, 1), "SAME"
        )
        return line, dense, half, conv(*small, preferred_element_type=jnp.int32), batched, cube

    # The sums of bfloat16 products are rounded to 8 bits, at other places in each library.
    same(everything, normal(2, 4, 9), normal(3, 4, 3), tolerance=2**-8)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_of_convolutions(stride: int, groups: int) -> None:
    def loss(x, w):
        return (conv(x, w, (stride, stride), feature_group_count=groups) ** 2).sum()

    same(jax.grad(loss, (0, 1)), IMAGE, normal(3, 3, 4 // groups, 6))


@settings(max_examples=15)
@given(st.data())
def test_every_convolution(data) -> None:
    def pair(low, high):
        return tuple(data.draw(st.integers(low, high)) for _ in range(2))

    options = {
        "window_strides": pair(1, 2),
        "padding": (pair(0, 2), pair(-1, 2)),
        "lhs_dilation": pair(1, 2),
        "rhs_dilation": pair(1, 2),
    }
    groups = data.draw(st.integers(1, 2))
    across = data.draw(st.booleans())
    kernel = pair(1, 3)
    x, w = normal(2, 4, 6, 5), normal(4, 4 if across else 4 // groups, *kernel)
    name = "batch_group_count" if across else "feature_group_count"
    same(
        lambda x, w: lax.conv_general_dilated(x, w, **options, **{name: groups}),
        x,
        w,
        importer=False,
    )


WINDOWS = {
    "apart": (1, 2, 2, 1),
    "overlapping": (1, 2, 3, 1),
}


@pytest.mark.parametrize(
    ("operation", "start"), [(lax.max, -jnp.inf), (lax.min, jnp.inf), (lax.add, 0.0)]
)
def test_pooling_and_its_gradients(operation, start: float) -> None:
    def pool(x, window, padding="SAME"):
        return lax.reduce_window(x, start, operation, window, (1, 2, 2, 1), padding)

    def everything(x, t):
        pools = [pool(x, window) for window in WINDOWS.values()]
        backward = [jax.grad(lambda x: (pool(x, w) ** 2).sum())(x) for w in WINDOWS.values()]  # noqa: B023
        forward = jax.jvp(lambda x: pool(x, (1, 2, 2, 1)), (x,), (t,))[1]
        everywhere = lax.reduce_window(x, start, operation, (2, 2, 2, 2), (1, 1, 2, 2), "VALID")
        spread = lax.reduce_window(
            x, start, operation, (1, 2, 3, 1), (1, 2, 1, 1), ((0, 0), (3, 1), (2, -1), (0, 0)),
            (1, 2, 1, 1), (1, 1, 2, 1),
        )  # fmt: skip
        return pools, backward, forward, everywhere, spread

    same(everything, IMAGE, normal(2, 6, 7, 4) + 1)


@settings(max_examples=10)
@given(st.data())
def test_every_window(data) -> None:
    def triple(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(low, high)) for _ in range(3))

    operation, start = data.draw(
        st.sampled_from([(lax.max, -jnp.inf), (lax.min, jnp.inf), (lax.add, 0.0), (lax.mul, 1.0)])
    )
    pads = tuple(zip(triple(-1, 2), triple(0, 2), strict=True))
    window, strides, spread, holes = triple(1, 3), triple(1, 2), triple(1, 2), triple(1, 2)
    same(
        lambda x: lax.reduce_window(x, start, operation, window, strides, pads, spread, holes),
        normal(5, 6, 7),
        importer=False,
    )


def test_the_first_of_equals_gets_the_gradient() -> None:
    def loss(x):
        return (
            lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") ** 2
        ).sum()

    same(jax.grad(loss), jnp.round(IMAGE))


def test_other_windows() -> None:
    def everything(x, i):
        product = lax.reduce_window(x, 1.0, lax.mul, (1, 2, 2, 1), (1, 1, 2, 1), "SAME")
        whole = lax.reduce_window(i, 0, lax.add, (1, 2, 2, 1), (1, 1, 2, 1), "SAME")
        most = lax.reduce_window(
            i, jnp.iinfo("int32").min, lax.max, (1, 2, 1, 1), (1, 1, 2, 1), "SAME"
        )
        return product, whole, most

    same(everything, IMAGE, jnp.round(IMAGE * 5).astype(jnp.int32))


def test_batch_of_symbolic_size() -> None:
    def everything(x, w):
        y = conv(x, w)
        pool = (1, 2, 2, 1)
        return y, lax.reduce_window(y, -jnp.inf, lax.max, pool, pool, "VALID")

    same(everything, IMAGE, normal(3, 3, 4, 5), dynamic={"x": "B, ..."})


def test_padding_after_a_transpose_is_for_all_axes() -> None:
    """A Pad of some axes only, behind a Transpose, ends the call in onnxruntime 1.32."""

    def pools(x):
        window = (1, 2, 2, 1)
        most = lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")
        return lax.reduce_window(most, 0.0, lax.add, window, (1, 1, 1, 1), "SAME")

    model = same(pools, jnp.ones((2, 8, 8, 4)), importer=False)
    assert "Pad" in ops(model) and "Transpose" in ops(model)
