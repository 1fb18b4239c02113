"""Tokenizers: text comes back, and no byte is counted twice or not at all."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fnml.recipes
from fnml.core import DataError, MissingExtraError
from fnml.recipes import find_recipe, from_json
from fnml.recipes._tokenizer import BpeTokenizer, ByteTokenizer, train_bpe

TEXT = Path(fnml.recipes.__file__).with_name("_run.py").read_bytes() + "naïve — 数 🙂\n".encode()


@given(st.binary(max_size=300))
def test_bytes_are_their_own_tokens(text):
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(text)
    assert tokens.tolist() == list(text)
    assert tokenizer.lengths[tokens].sum() == len(text)
    assert tokenizer.decode(tokens) == text.decode("utf-8", errors="replace")


def test_byte_tokens_of_any_integer_dtype_decode():
    tokens = np.array([104, 105, 195, 169], np.int32)
    assert ByteTokenizer().decode(tokens) == "hié"


@pytest.fixture(scope="module")
def learnt():
    pytest.importorskip("tokenizers")
    return train_bpe(TEXT, 500)


@pytest.fixture(scope="module")
def tokenizer(learnt):
    return BpeTokenizer(learnt)


def test_byte_pairs_shorten_the_text_they_learnt_from(tokenizer):
    tokens = tokenizer.encode(TEXT)
    assert tokens.dtype == np.int32
    assert len(tokens) < 0.6 * len(TEXT)
    assert tokens.min() >= 0 and tokens.max() < 500 == len(tokenizer.lengths)


def test_byte_pairs_account_for_every_byte_of_the_text(tokenizer):
    assert tokenizer.lengths[tokenizer.encode(TEXT)].sum() == len(TEXT)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT.decode()


@given(st.text(max_size=100))
def test_byte_pairs_give_any_text_back(tokenizer, text):
    tokens = tokenizer.encode(text.encode())
    assert tokenizer.decode(tokens) == text
    assert tokenizer.lengths[tokens].sum() == len(text.encode())


@given(st.binary(max_size=100))
def test_byte_pairs_replace_what_is_no_utf8(tokenizer, text):
    replaced = text.decode("utf-8", errors="replace")
    assert tokenizer.decode(tokenizer.encode(text)) == replaced


def test_learning_is_deterministic(learnt):
    # Rust's hash maps are seeded anew for each call, so an order taken from one would differ.
    assert {train_bpe(TEXT, 500) for _ in range(5)} == {learnt}


@settings(max_examples=20)
@given(st.integers(-10, 256))
def test_a_vocabulary_without_room_for_pairs_is_refused(vocab):
    pytest.importorskip("tokenizers")
    with pytest.raises(DataError, match=f"above 256, got {vocab}: set --vocab"):
        train_bpe(TEXT, vocab)


def test_a_vocabulary_that_the_text_cannot_fill_names_the_size_that_it_can():
    pytest.importorskip("tokenizers")
    with pytest.raises(DataError, match="for 259 tokens, not for 300: set --vocab 259"):
        train_bpe(b"abab abab", 300)
    assert len(BpeTokenizer(train_bpe(b"abab abab", 259)).lengths) == 259


@pytest.mark.parametrize("data", [b"", b"{", b"{}", b"null", b"\xff", b'{"version": "1.0"}'])
def test_what_is_no_tokenizer_is_refused(data):
    pytest.importorskip("tokenizers")
    with pytest.raises(DataError, match="this is no tokenizer"):
        BpeTokenizer(data)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    for call in (lambda: train_bpe(TEXT, 300), lambda: BpeTokenizer(b"{}")):
        with pytest.raises(MissingExtraError, match=r"pip install 'fnml\[bpe\]'"):
            call()


def test_a_run_takes_its_own_tokenizer_up_again(tmp_path, learnt):
    recipe = find_recipe("lm")
    (tmp_path / "text").write_bytes(TEXT)
    config = from_json(
        recipe.config,
        {
            "text": [str(tmp_path / "text")],
            "tokens": "bpe",
            "model": {"vocab": 400, "width": 8, "layers": 1, "heads": 1, "context": 16},
        },
    )
    first = recipe.build(config, None)
    (data,) = first.files.values()
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data)
    assert recipe.build(config, tmp_path).train.state() == first.train.state()

    path.write_bytes(learnt)
    with pytest.raises(DataError, match=r"tokenizer.json has 500 tokens, the run's model 400"):
        recipe.build(config, tmp_path)
    path.write_bytes(data[:-10])
    with pytest.raises(DataError, match=r"tokenizer.json cannot be read: this is no tokenizer"):
        recipe.build(config, tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"tokenizer.json cannot be read: .*No such file"):
        recipe.build(config, tmp_path)
