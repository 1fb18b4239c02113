"""Text to tokens and back: bytes, or byte pairs learnt from the text."""

from typing import Any, NamedTuple, Protocol

import numpy as np

from fnml.core import DataError, require


class Tokenizer(Protocol):
    """What a language-model recipe asks of a tokenizer.

    Attributes:
      lengths: int32 ``[V]``, how many bytes of text each token stands for.
    """

    lengths: np.ndarray

    def encode(self, text: bytes) -> np.ndarray:
        """Return the tokens of ``text``, integers ``[N]``."""

    def decode(self, tokens: np.ndarray) -> str:
        """Return the text of ``tokens``; bytes that are no UTF-8 show as U+FFFD."""


class ByteTokenizer(NamedTuple):
    """Each byte is a token.

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.decode(tokenizer.encode("né".encode()))
    'né'
    """

    lengths: np.ndarray = np.ones(256, np.int32)

    def encode(self, text: bytes) -> np.ndarray:
        """Return the bytes themselves, uint8 ``[N]``; the memory is shared."""
        return np.frombuffer(text, np.uint8)

    def decode(self, tokens: np.ndarray) -> str:
        """Decode bytes as UTF-8."""
        return np.asarray(tokens).astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class BpeTokenizer:
    """Byte pairs, encoded by the ``tokenizers`` package (extra ``bpe``).

    Args:
      data: the tokenizer as JSON, from :func:`train_bpe`.

    Raises:
      DataError: ``data`` is no tokenizer.
      MissingExtraError: the package is not installed.
    """

    def __init__(self, data: bytes):
        library: Any = require("tokenizers", extra="bpe")
        try:
            self._inner = library.Tokenizer.from_str(data.decode("utf-8"))
        except (KeyboardInterrupt, SystemExit):
            raise
        # The library panics at some files, and a panic is no Exception.
        except BaseException as error:
            raise DataError(f"this is no tokenizer: {error}") from error
        letters = set(library.pre_tokenizers.ByteLevel.alphabet())
        vocabulary = sorted(self._inner.get_vocab().items(), key=lambda item: item[1])
        if [number for _, number in vocabulary] != list(range(len(vocabulary))):
            raise DataError(
                f"this is no tokenizer: its {len(vocabulary)} tokens are not numbered from 0"
            )
        # The byte-level alphabet writes each byte as one letter, so letters count bytes.
        self.lengths = np.array(
            [len(token) if letters.issuperset(token) else 0 for token, _ in vocabulary], np.int32
        )

    def encode(self, text: bytes) -> np.ndarray:
        """Encode text, int32 ``[N]``; bytes that are no UTF-8 are replaced."""
        return np.array(self._inner.encode(text.decode("utf-8", errors="replace")).ids, np.int32)

    def decode(self, tokens: np.ndarray) -> str:
        """Decode tokens."""
        return self._inner.decode(np.asarray(tokens).tolist())


def train_bpe(text: bytes, vocab: int) -> bytes:
    """Learn byte pairs from ``text`` until there are ``vocab`` tokens; return them as JSON.

    Source: Sennrich et al. 2016, "Neural machine translation of rare words with subword units".

    Raises:
      DataError: ``vocab`` is below 257, or the text has too few different pairs for it.
      MissingExtraError: the ``tokenizers`` package is not installed.
    """
    library: Any = require("tokenizers", extra="bpe")
    if vocab < 257:
        raise DataError(f"byte pairs need a vocabulary above 256, got {vocab}: set --vocab 1024")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab,
        show_progress=False,
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
    )
    lines = text.decode("utf-8", errors="replace").splitlines(keepends=True)
    tokenizer.train_from_iterator(lines, trainer)
    learnt = tokenizer.get_vocab_size()
    if learnt != vocab:
        raise DataError(
            f"the text has enough different pairs for {learnt} tokens, not for {vocab}: set "
            f"--vocab {learnt} or use more text"
        )
    return tokenizer.to_str().encode("utf-8")
