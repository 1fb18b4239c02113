"""The digits recipe: its data, its augmentation, its loss and its samples."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnml.core import init
from fnml.models import CNNConfig, MLPConfig
from fnml.recipes import RunConfig, SampleConfig, find_recipe
from fnml.recipes._digits import HELD_OUT, DigitsConfig, _shifted, read_digits

EVERYTHING = np.arange(1797)


@pytest.fixture(scope="module")
def digits():
    return read_digits().gather(EVERYTHING)


def test_the_data_are_small_gray_pictures_of_ten_classes(digits):
    images, labels = digits["images"], digits["labels"]
    assert (images.shape, images.dtype) == ((1797, 8, 8), np.uint8)
    assert (labels.shape, labels.dtype) == ((1797,), np.int32)
    assert (images.min(), images.max()) == (0, 16)
    # The counts that the data set's own documentation gives for this part.
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_the_data_are_those_of_scikit_learn(digits):
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    theirs = datasets.load_digits()
    np.testing.assert_array_equal(theirs.images, digits["images"])
    np.testing.assert_array_equal(theirs.target, digits["labels"])


def small(**fields):
    return DigitsConfig(
        cnn=CNNConfig(classes=10, widths=(4, 8), dropout=fields.pop("dropout", 0.0)),
        mlp=MLPConfig(inputs=64, hidden=(16,), outputs=10),
        **fields,
    )


def build(**fields):
    task = find_recipe("digits").build(small(**fields), None)
    return task, init(task.model.spec, jax.random.key(1)), init(task.model.state, jax.random.key(2))


def test_the_split_is_fixed_and_shares_nothing():
    one, two = build(run=RunConfig(seed=0))[0], build(run=RunConfig(seed=7))[0]
    train, held_out = one.train.source, next(iter(one.held_out()))
    assert len(train) == 1797 - HELD_OUT
    assert held_out["mask"].tolist() == [1.0] * HELD_OUT
    for a, b in zip(one.held_out(), two.held_out(), strict=True):
        np.testing.assert_array_equal(a["images"], b["images"])
    # No two of the 1,797 pictures are equal, so pictures tell whether the parts are disjoint.
    pictures = [image.tobytes() for image in train.gather(np.arange(len(train)))["images"]]
    pictures += [image.tobytes() for image in held_out["images"]]
    assert len(set(pictures)) == 1797


def test_shifting_moves_the_picture_and_keeps_its_content(digits):
    images = jnp.asarray(digits["images"][:64], jnp.float32)
    moved = np.asarray(_shifted(images, jax.random.key(0), 1))
    offsets = set()
    for before, after in zip(np.asarray(images), moved, strict=True):
        padded = np.pad(before, 1)
        found = [
            (y, x)
            for y in range(3)
            for x in range(3)
            if (padded[y : y + 8, x : x + 8] == after).all()
        ]
        assert found, "a shifted picture is not a window of the padded one"
        offsets.add(found[0])
    assert len(offsets) == 9
    again = _shifted(images, jax.random.key(0), 1)
    np.testing.assert_array_equal(again, moved)


def loss_of(task, params, state, batch, key, train=True):
    loss_fn = jax.jit(task.loss_fn if train else task.eval_loss_fn)
    options = {"state": state} if jax.tree.leaves(state) else {}
    return loss_fn(params, batch, key, **options)


def batch_of(task, start=0, count=12):
    return task.train.source.gather(np.arange(start, start + count))


@pytest.mark.parametrize("network", ["cnn", "mlp"])
def test_the_loss_is_a_mean_with_its_weight_and_statistics(network):
    task, params, state = build(network=network)
    batch = batch_of(task)
    loss, metrics = loss_of(task, params, state, batch, jax.random.key(0))
    assert loss.shape == () and loss.dtype == jnp.float32
    assert float(metrics.weight) == 12
    assert float(metrics.values["accuracy"].weight) == 12
    means = jax.tree.map(lambda _: 0, state)
    assert jax.tree.structure(means) == jax.tree.structure(
        metrics.stats, is_leaf=lambda x: hasattr(x, "total")
    )
    assert bool(jax.tree.leaves(state)) == (network == "cnn")


@pytest.mark.parametrize("network", ["cnn", "mlp"])
def test_the_evaluation_is_a_plain_cross_entropy_and_needs_no_key(network):
    task, params, state = build(network=network, dropout=0.5)
    batch = batch_of(task)
    masked = {**batch, "mask": np.array([1.0] * 9 + [0.0] * 3, np.float32)}
    loss, metrics = loss_of(task, params, state, masked, None, train=False)
    images = batch["images"][:9].astype(np.float32)[..., None] / 16
    if network == "cnn":
        logits, _ = jax.jit(functools.partial(task.model.apply, train=False))(
            params, images, state=state
        )
    else:
        logits = task.model.apply(params, images)
    logits = np.asarray(logits, np.float64)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -logs[np.arange(9), batch["labels"][:9]].mean()
    # float32 against float64: a few rounding errors of a number near log(10).
    np.testing.assert_allclose(float(loss), expected, rtol=1e-5)
    assert float(metrics.weight) == 9
    right = (logits.argmax(-1) == batch["labels"][:9]).mean()
    np.testing.assert_allclose(float(metrics.values["accuracy"].value), right, rtol=1e-6)
    assert metrics.stats == ()
    again, _ = loss_of(task, params, state, masked, None, train=False)
    assert float(again) == float(loss)


def test_smoothing_counts_in_training_only():
    smooth, params, state = build(network="mlp", label_smoothing=0.3, shift=0)
    plain, _, _ = build(network="mlp", label_smoothing=0.0, shift=0)
    batch = batch_of(smooth)
    values = {
        (name, train): float(loss_of(task, params, state, batch, None, train=train)[0])
        for name, task in (("smooth", smooth), ("plain", plain))
        for train in (True, False)
    }
    assert values["smooth", True] != values["plain", True]
    assert values["smooth", False] == values["plain", False] == values["plain", True]


def test_each_key_shifts_in_its_own_way():
    task, params, state = build(network="mlp")
    batch = batch_of(task)
    losses = [float(loss_of(task, params, state, batch, jax.random.key(i))[0]) for i in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("network", ["cnn", "mlp"])
def test_dropout_is_drawn_in_training(network):
    plain, params, state = build(network=network, shift=0)
    config = dataclasses.replace(
        small(network=network, shift=0, dropout=0.5),
        mlp=MLPConfig(inputs=64, hidden=(16,), outputs=10, dropout=0.5),
    )
    dropping = find_recipe("digits").build(config, None)
    batch, key = batch_of(plain), jax.random.key(3)
    with_it, without = (
        float(loss_of(task, params, state, batch, key)[0]) for task in (dropping, plain)
    )
    assert with_it != without
    assert float(loss_of(dropping, params, state, batch, None)[0]) == without


@pytest.mark.parametrize("network", ["cnn", "mlp"])
def test_samples_show_held_out_digits_with_the_models_verdicts(network):
    task, params, state = build(network=network)
    text = task.sample(params, state, SampleConfig(length=6))
    lines = text.split("\n")
    assert len(lines) == 2 * 9 and max(map(len, lines)) <= 80
    assert set("".join(lines[:8])) <= set(" .:-=+*#%@")
    assert lines[8].count("), is ") == 4 and lines[17].count("), is ") == 2
    assert task.sample(params, state, SampleConfig(length=6)) == text
    assert task.sample(params, state, SampleConfig(length=6, seed=1)) != text
    assert task.sample(params, state, SampleConfig()).count("), is ") == 8


def test_a_sampled_picture_is_the_digit_it_is_said_to_be():
    task, params, state = build(network="mlp")
    lines = task.sample(params, state, SampleConfig(length=1, seed=4)).split("\n")
    shades = " .:-=+*#%@"
    shown = np.array([[shades.index(x) for x in line.ljust(16)[::2]] for line in lines[:8]])
    held_out = next(iter(task.held_out()))
    same = [(image.astype(int) * 9 // 16 == shown).all() for image in held_out["images"]]
    assert held_out["labels"][same].tolist() == [int(lines[8].rsplit(" ", 1)[1])]
