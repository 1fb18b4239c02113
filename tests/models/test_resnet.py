import jax
import numpy as np
import pytest

from fnml.core import ConfigError, count, init
from fnml.models import ResNetConfig, resnet


def _convolve(x, kernel, stride):
    """Convolve with "SAME" padding in float64, one position of the kernel at a time."""
    size, rows = len(kernel), -(-x.shape[1] // stride)
    total = max((rows - 1) * stride + size - x.shape[1], 0)
    x = np.pad(x, ((0, 0), *[(total // 2, total - total // 2)] * 2, (0, 0)))
    last = (rows - 1) * stride + 1
    return sum(
        x[:, i : i + last : stride, j : j + last : stride] @ kernel[i, j]
        for i in range(size)
        for j in range(size)
    )


def _normalise(x, p):
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return (x - mean) / np.sqrt(variance + 1e-5) * p["scale"] + p["bias"]


def _relu(x):
    return np.maximum(x, 0)


def _reference(p, x):
    """Run the network in training mode, in NumPy's float64."""
    x = _relu(_normalise(_convolve(x, p["stem"]["conv"], 1), p["stem"]["norm"]))
    for i, stage in enumerate(p["stages"]):
        for j, block in enumerate(stage):
            stride = 2 if i and not j else 1
            y = _relu(_normalise(_convolve(x, block["conv1"], stride), block["norm1"]))
            y = _normalise(_convolve(y, block["conv2"], 1), block["norm2"])
            if "shortcut" in block:
                x = _normalise(_convolve(x, block["shortcut"], stride), block["shortcut_norm"])
            x = _relu(x + y)
    return x.mean((1, 2)) @ p["head"]["kernel"] + p["head"]["bias"]


def test_logits_equal_those_of_a_network_written_in_numpy():
    # 16 channels and 4 rows are enough for the form that is chosen for large networks.
    model = resnet(ResNetConfig(classes=5, widths=(16, 20), blocks=(1, 2)))
    params, state = (init(tree, jax.random.key(0)) for tree in (model.spec, model.state))
    params["stages"][1][0]["norm1"]["scale"] *= 1.5
    params["stages"][0][0]["norm2"]["bias"] += 0.3
    x = np.random.default_rng(0).normal(size=(4, 9, 9, 3)).astype(np.float32)
    got, _ = jax.jit(lambda p, x: model.apply(p, x, state=state, train=True))(params, x)
    want = _reference(
        jax.tree.map(lambda a: np.asarray(a, np.float64), params), x.astype(np.float64)
    )
    # A dozen float32 layers, each a few 1e-7 off.
    assert np.linalg.norm(got - want) < 2e-5 * np.linalg.norm(want)


def test_the_default_is_resnet_18_of_the_field():
    # torchvision's resnet18 has 11,689,512 parameters with its 7 x 7 stem and 1,000 classes.
    stem, head = 64 * 3 * (49 - 9), 512 * 990 + 990
    assert count(resnet(ResNetConfig(classes=10)).spec) == 11_689_512 - stem - head


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"blocks": (2, 2)}, r"blocks=\(2, 2\): expected one number for each of the 4 stages"),
        ({"widths": (), "blocks": ()}, "at least one stage"),
        ({"classes": 0, "dropout": 1.0}, "classes=0.*dropout=1.0"),
        ({"form": "xal"}, "form='xal'.*'xla'"),
    ],
)
def test_faults_in_a_configuration_are_named(fields, said):
    with pytest.raises(ConfigError, match=said):
        ResNetConfig(**({"classes": 3} | fields))
