"""The language-model recipe: what its loss counts, and how it draws text."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import fnml.recipes
from fnml.core import ConfigError, init
from fnml.models import GPTConfig
from fnml.recipes import RunConfig, SampleConfig, find_recipe
from fnml.recipes._lm import LmConfig

SMALL = GPTConfig(width=16, layers=1, heads=2, context=24)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.py"
    path.write_bytes(Path(fnml.recipes.__file__).with_name("_run.py").read_bytes()[:6000])
    return path


def config_of(text, **fields):
    return LmConfig(
        **{"run": RunConfig(batch_size=3, seed=5), "model": SMALL, "text": (str(text),), **fields}
    )


@pytest.fixture(scope="module")
def built(text):
    task = find_recipe("lm").build(config_of(text), None)
    return task, init(task.model.spec, jax.random.key(0))


@pytest.fixture(scope="module")
def built_bpe(text):
    pytest.importorskip("tokenizers")
    config = config_of(text, tokens="bpe", model=dataclasses.replace(SMALL, vocab=300))
    task = find_recipe("lm").build(config, None)
    return task, init(task.model.spec, jax.random.key(0))


def nats(task, params, batch):
    """Return the cross entropy of every token in float64, by the textbook; [B, T]."""
    logits = np.asarray(jax.jit(task.model.apply)(params, batch["tokens"]), np.float64)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(logs, batch["targets"][..., None], -1)[..., 0]


def test_windows_are_of_the_text_and_shifted_by_one(built, text):
    task, _ = built
    source = task.train.source
    raw = text.read_bytes()
    batch = source.gather(np.arange(len(source)))
    for i in (0, 1, len(source) - 1):
        at = 12 * i
        assert bytes(batch["tokens"][i].astype(np.uint8)) == raw[at : at + 24]
        assert bytes(batch["targets"][i].astype(np.uint8)) == raw[at + 1 : at + 25]


def test_byte_tokens_have_one_loss_in_nats_per_byte(built):
    task, params = built
    batch = task.train.at(0)
    loss, metrics = jax.jit(task.loss_fn)(params, batch, jax.random.key(0))
    # float32 sums of 72 numbers near log(256) against float64.
    np.testing.assert_allclose(float(loss), nats(task, params, batch).mean(), rtol=1e-5)
    assert float(metrics.weight) == 3 * 24
    assert dict(metrics.values) == {}


def test_byte_pairs_also_count_nats_per_byte(built_bpe):
    task, params = built_bpe
    batch = task.train.at(0)
    loss, metrics = jax.jit(task.loss_fn)(params, batch, None)
    expected = nats(task, params, batch)
    np.testing.assert_allclose(float(loss), expected.mean(), rtol=1e-5)
    vocabulary = len(jax.jit(task.model.apply)(params, batch["tokens"])[0, 0])
    (data,) = task.files.values()
    library = pytest.importorskip("tokenizers")
    tokenizer = library.Tokenizer.from_str(data.decode())
    assert tokenizer.get_vocab_size() == vocabulary == 300
    pieces = [tokenizer.id_to_token(int(token)) for token in batch["targets"].ravel()]
    # Each letter of the byte-level alphabet stands for a byte.
    length = sum(map(len, pieces))
    assert length > len(pieces)
    per_byte = metrics.values["nats_per_byte"]
    assert float(per_byte.weight) == length
    np.testing.assert_allclose(float(per_byte.value), expected.sum() / length, rtol=1e-5)


@pytest.mark.parametrize("which", ["built", "built_bpe"])
def test_masked_windows_do_not_count(which, request):
    task, params = request.getfixturevalue(which)
    batch = task.train.at(0)
    masked = {**batch, "mask": np.array([1.0, 0.0, 1.0], np.float32)}
    kept = {name: value[[0, 2]] for name, value in batch.items()}
    loss, metrics = jax.jit(task.eval_loss_fn)(params, masked, None)
    alone, metrics_alone = jax.jit(task.eval_loss_fn)(params, kept, None)
    np.testing.assert_allclose(float(loss), float(alone), rtol=1e-6)
    assert float(metrics.weight) == float(metrics_alone.weight) == 48
    for name, mean in metrics.values.items():
        assert float(mean.weight) == float(metrics_alone.values[name].weight)
        np.testing.assert_allclose(
            float(mean.value), float(metrics_alone.values[name].value), rtol=1e-6
        )


def test_the_held_out_text_is_evaluated_once_and_whole(built, text):
    task, _ = built
    batches = list(task.held_out())
    windows = np.concatenate([b["tokens"][b["mask"] > 0] for b in batches])
    raw = text.read_bytes()
    held_out = raw[len(raw) - len(raw) // 20 :]
    count = (len(held_out) - 1) // 24
    assert bytes(windows.astype(np.uint8).ravel()) == held_out[: 24 * count]
    first, again = (next(iter(task.held_out()))["tokens"] for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_dropout_is_drawn_with_a_key_only(text, built):
    task = find_recipe("lm").build(
        config_of(text, model=dataclasses.replace(SMALL, dropout=0.3)), None
    )
    plain, params = built
    batch = task.train.at(0)
    keys = [jax.random.key(0), jax.random.key(0), jax.random.key(1), None]
    losses = [float(jax.jit(task.loss_fn)(params, batch, key)[0]) for key in keys]
    assert losses[0] == losses[1] != losses[2]
    assert losses[3] == float(jax.jit(plain.loss_fn)(params, batch, None)[0])


def test_with_experts_training_asks_for_an_even_use_and_evaluation_does_not(text):
    config = config_of(text, model=dataclasses.replace(SMALL, experts=4), balance=0.5)
    task = find_recipe("lm").build(config, None)
    params, batch = init(task.model.spec, jax.random.key(0)), task.train.at(0)
    loss, metrics = jax.jit(task.loss_fn)(params, batch, None)
    held_out, _ = jax.jit(task.eval_loss_fn)(params, batch, None)
    balance = float(metrics.values["balance"].value)
    assert balance >= 1.0
    np.testing.assert_allclose(float(loss), float(held_out) + 0.5 * balance, rtol=1e-6)


def drawn(built, **fields):
    task, params = built
    return task.sample(params, (), SampleConfig(**fields))


def test_samples_have_the_length_asked_for_and_follow_the_seed(built):
    one = drawn(built, length=15, seed=1)
    assert one == drawn(built, length=15, seed=1) != drawn(built, length=15, seed=2)
    greedy = drawn(built, length=15, temperature=0.0, seed=1)
    assert greedy == drawn(built, length=15, temperature=0.0, seed=2)
    # Beyond the context too; bytes that are no UTF-8 show as one character or are part of one.
    assert 0 < len(drawn(built, length=40, temperature=0.0)) <= 40


def test_greedy_samples_are_the_models_own_argmax(built):
    task, params = built
    tokens = list(b"def ")
    for _ in range(8):
        logits = jax.jit(task.model.apply)(params, np.array([tokens], np.int32))
        tokens.append(int(np.argmax(np.asarray(logits)[0, -1])))
    expected = bytes(tokens).decode("utf-8", errors="replace")
    assert drawn(built, prompt="def ", length=8, temperature=0.0) == expected


def test_a_long_prompt_is_shown_whole_though_the_model_reads_its_end(built):
    prompt = "x = 1\n" * 30
    shown = drawn(built, prompt=prompt, length=5, temperature=0.0)
    assert shown.startswith(prompt)
    short = drawn(built, prompt=prompt[-12:], length=5, temperature=0.0)
    assert shown.removeprefix(prompt) == short.removeprefix(prompt[-12:])


def test_a_prompt_may_hold_bytes_that_are_no_text(built):
    # What Python makes of a command line's argument that is no UTF-8.
    assert drawn(built, prompt="a\udcff", length=3).startswith("a\udcff")


def test_byte_pairs_draw_text_too(built_bpe):
    assert drawn(built_bpe, prompt="import ", length=9).startswith("import ")


def test_more_candidates_than_tokens_are_refused(built):
    with pytest.raises(ConfigError, match="top_k=257: expected 1 to vocab=256"):
        drawn(built, top_k=257)
