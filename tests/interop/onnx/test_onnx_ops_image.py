import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from jax.test_util import check_grads
from one_op import in_importer, in_onnxruntime, one_op, same

from fnml.core import ConfigError, ShapeError
from fnml.interop.onnx import from_onnx

RNG = np.random.default_rng(0)
IMAGE = RNG.normal(size=(1, 2, 4, 5)).astype(np.float32)
UP, DOWN = (1.0, 1.0, 1.75, 2.5), (1.0, 1.0, 0.75, 0.625)
COORDINATES = [
    "half_pixel",
    "half_pixel_symmetric",
    "pytorch_half_pixel",
    "align_corners",
    "asymmetric",
]


def resize(x, scales=None, sizes=None, roi=None, opset=19, **attributes):
    scales = None if scales is None else np.array(scales, np.float32)
    sizes = None if sizes is None else np.array(sizes, np.int64)
    inputs = [x, roi, scales, sizes][: 4 if sizes is not None else 3]
    return same(
        "Resize", inputs, [x.dtype], opset, rtol=1e-4, atol=1e-5, compiled=False, **attributes
    )


@pytest.mark.parametrize("scales", [UP, DOWN])
@pytest.mark.parametrize("coordinate", COORDINATES)
@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_resize_equals_onnxruntime(mode, coordinate, scales):
    resize(IMAGE, scales, mode=mode, coordinate_transformation_mode=coordinate)


@pytest.mark.parametrize("rounding", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
@pytest.mark.parametrize("coordinate", ["half_pixel", "asymmetric", "align_corners"])
def test_resize_to_the_nearest_equals_onnxruntime(coordinate, rounding):
    for sizes in ((1, 2, 7, 3), (1, 2, 8, 10)):
        resize(
            IMAGE,
            sizes=sizes,
            mode="nearest",
            nearest_mode=rounding,
            coordinate_transformation_mode=coordinate,
        )


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_resize_of_a_region_equals_onnxruntime(mode):
    roi = np.array([0, 0, 0.25, 0.5, 1, 1, 1.25, 0.75], np.float32)
    resize(
        IMAGE,
        sizes=(1, 2, 3, 4),
        roi=roi,
        mode=mode,
        coordinate_transformation_mode="tf_crop_and_resize",
        extrapolation_value=7.0,
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_images_of_integers_are_resized_as_in_onnxruntime(dtype):
    x = (np.abs(IMAGE) * 80).astype(dtype)
    # The filter of antialias is rounded there after every axis: by one at most it differs.
    for antialias, atol in ((0, 0), (1, 1)):
        sizes = np.array((1, 2, 3, 4), np.int64)
        inputs = [x, None, None, sizes]
        same("Resize", inputs, [dtype], 19, atol=atol, mode="linear", antialias=antialias)


def test_downscaling_filters_equal_onnxruntime():
    for mode in ("linear", "cubic"):
        resize(IMAGE, sizes=(1, 2, 2, 3), mode=mode, antialias=1)


def test_cubic_options_equal_onnxruntime():
    resize(IMAGE, UP, mode="cubic", cubic_coeff_a=-0.5, exclude_outside=1)


@pytest.mark.parametrize("policy", ["stretch", "not_larger", "not_smaller"])
def test_aspect_policies_equal_onnxruntime(policy):
    resize(IMAGE, sizes=(6, 7), axes=[2, 3], mode="linear", keep_aspect_ratio_policy=policy)


@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_old_resize_and_upsample_equal_onnxruntime(mode):
    scales = np.array([1, 1, 2, 3], np.float32)
    same("Resize", [IMAGE, scales], opset=10, mode=mode)
    same("Upsample", [IMAGE, scales], opset=9, mode=mode)
    same("Upsample", [IMAGE], opset=7, mode=mode, scales=scales.tolist())
    for smaller in ((1, 1, 0.75, 0.5), (1, 1, 0.7, 1.2), (1, 1, 1.2, 1.1)):
        same("Resize", [IMAGE, np.array(smaller, np.float32)], opset=10, mode=mode)


def test_an_infinite_pixel_stays_where_it_is():
    x = np.zeros((1, 1, 1, 8), np.float32)
    x[..., 2] = np.inf
    scales = np.array([1, 1, 1, 2], np.float32)
    (y,) = in_importer(
        one_op("Resize", [x, None, scales], opset=19, mode="linear"), [x, None, scales]
    )
    assert np.isfinite(y[..., 7:]).all() and np.isinf(y[..., 4]).all()


def test_resize_gradient():
    with jax.enable_x64(True):
        x = IMAGE.astype(np.float64)
        inputs = [x, None, np.array(UP, np.float32)]
        model = one_op("Resize", inputs, [np.float64], opset=19, mode="cubic")
        imported, params = from_onnx(model, static_inputs={"i2": inputs[2]})
        run = jax.jit(lambda x: imported.apply(params, x))
        check_grads(run, [jnp.asarray(x)], 1, modes=["rev"])


@pytest.mark.parametrize("mode", ["linear", "nearest", "cubic"])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
def test_grid_sample_equals_onnxruntime(padding, mode):
    # Beyond the image by up to its own length.
    grid = RNG.uniform(-2, 2, size=(1, 6, 3, 2)).astype(np.float32)
    for corners in (0, 1):
        same(
            "GridSample",
            [IMAGE, grid],
            opset=20,
            rtol=1e-4,
            atol=1e-5,
            mode=mode,
            padding_mode=padding,
            align_corners=corners,
        )


def test_grid_sample_of_a_volume_and_its_gradient():
    with jax.enable_x64(True):
        volume, grid = RNG.normal(size=(1, 1, 3, 4, 2)), RNG.uniform(-1.2, 1.2, (1, 2, 2, 1, 3))
        inputs = [volume, grid]
        same("GridSample", inputs, [np.float64], opset=20, align_corners=1)
        imported, params = from_onnx(one_op("GridSample", inputs, [np.float64], opset=20))
        arrays = [jnp.asarray(x) for x in inputs]
        run = jax.jit(lambda *xs: imported.apply(params, *xs))
        check_grads(run, arrays, 1, modes=["rev"], eps=1e-6)


def test_grid_sample_refuses_an_unknown_padding():
    grid = np.zeros((1, 2, 2, 2), np.float32)
    model = one_op("GridSample", [IMAGE, grid], opset=20, padding_mode="wrap")
    with pytest.raises(ConfigError, match=r"node 'node' .GridSample.*'wrap'.*zeros, border"):
        in_importer(model, [IMAGE, grid])


@pytest.mark.parametrize("spatial", [(3, 4), (2, 3, 4)])
def test_affine_grid_equals_onnxruntime(spatial):
    rank = len(spatial)
    theta = RNG.normal(size=(2, rank, rank + 1)).astype(np.float32)
    size = np.array((2, 1, *spatial), np.int64)
    for corners in (0, 1):
        same("AffineGrid", [theta, size], opset=20, align_corners=corners)


ROIS = np.array([[0, 0, 3, 3], [1.5, 0.25, 6, 5], [-2, -1, 0.5, 9]], np.float32)


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("coordinate", ["half_pixel", "output_half_pixel"])
def test_roi_align_equals_onnxruntime(coordinate, mode):
    inputs = [np.concatenate([IMAGE, IMAGE[::-1] + 1]), ROIS, np.array([0, 1, 0], np.int64)]
    same(
        "RoiAlign",
        inputs,
        opset=16,
        mode=mode,
        coordinate_transformation_mode=coordinate,
        output_height=2,
        output_width=3,
        sampling_ratio=2,
        spatial_scale=0.75,
    )


def test_roi_align_with_as_many_samples_as_the_region_is_large():
    inputs = [IMAGE, ROIS, np.zeros(3, np.int64)]
    model = one_op("RoiAlign", inputs, opset=16, output_height=2, output_width=2)
    expected = in_onnxruntime(model, inputs)
    imported, params = from_onnx(model, static_inputs={"i1": ROIS})
    got = jax.jit(imported.apply)(params, inputs[0], inputs[2])
    np.testing.assert_allclose(got, expected[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ShapeError, match=r"input 1 .'i1'. decides a shape"):
        in_importer(model, inputs)


def test_max_roi_pool_equals_onnxruntime():
    rois = np.array([[0, 0, 0, 3, 3], [0, 1, 0, 4, 2], [0, 2, 2, 2, 2]], np.float32)
    same("MaxRoiPool", [IMAGE, rois], opset=13, pooled_shape=[2, 3], spatial_scale=1.0)


def test_max_unpool_turns_max_pool_around():
    pool = one_op("MaxPool", [IMAGE], [np.float32, np.int64], kernel_shape=[2, 2], strides=[2, 2])
    pooled, indices = in_onnxruntime(pool, [IMAGE])
    shape = np.array(IMAGE.shape, np.int64)
    same("MaxUnpool", [pooled, indices, shape], kernel_shape=[2, 2], strides=[2, 2])


def test_col2im_equals_onnxruntime():
    x = RNG.normal(size=(1, 2 * 4, 6)).astype(np.float32)
    image, block = np.array([5, 5], np.int64), np.array([2, 2], np.int64)
    same("Col2Im", [x, image, block], opset=18, pads=[0, 1, 0, 1], strides=[2, 2], dilations=[2, 2])


@pytest.mark.parametrize("shape", [(3, 2), (4, 8), (7, 5), (1, 4)])
def test_center_crop_pad_equals_onnxruntime(shape):
    # onnxruntime expands the operator's definition.
    sizes = np.array(shape, np.int64)
    same("CenterCropPad", [IMAGE, sizes], opset=18, compiled=False, axes=[2, 3])


def test_non_max_suppression_equals_onnxruntime():
    corner = RNG.uniform(0, 4, size=(2, 12, 2))
    boxes = np.concatenate([corner, corner + RNG.uniform(1, 3, size=(2, 12, 2))], axis=-1)
    boxes, scores = boxes.astype(np.float32), RNG.uniform(size=(2, 3, 12)).astype(np.float32)
    limits = [np.array([5], np.int64), np.array([0.3], np.float32), np.array([0.2], np.float32)]
    inputs = [boxes, scores, *limits]
    for centred in (0, 1):
        model = one_op("NonMaxSuppression", inputs, [np.int64], opset=11, center_point_box=centred)
        (expected,) = in_onnxruntime(model, inputs)
        (got,) = in_importer(model, inputs)
        assert len(expected) > 6
        np.testing.assert_array_equal(got, expected)


def test_non_max_suppression_refuses_boxes_known_only_at_run_time():
    inputs = [np.zeros((1, 2, 4), np.float32), np.zeros((1, 1, 2), np.float32)]
    model = one_op("NonMaxSuppression", inputs, [np.int64], opset=11)
    assert isinstance(model, onnx.ModelProto)
    imported, params = from_onnx(model)
    with pytest.raises(ShapeError, match=r"input 0 .'i0'. decides a shape or a structure"):
        jax.jit(imported.apply)(params, *inputs)
