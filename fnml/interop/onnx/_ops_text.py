"""Strings, which are known while tracing, and the counting of n-grams."""

import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from fnml.core import ConfigError
from fnml.interop.onnx._node import Node, Operator
from fnml.interop.onnx._static import static, traced, where_is


def _texts(values: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return strings as an array of objects of a shape."""
    out = np.empty(len(values), object)
    out[:] = values
    return out.reshape(shape)


def _string_concat(node: Node, x: Any, y: Any) -> np.ndarray:
    left, right = np.broadcast_arrays(static(node, 0, x), static(node, 1, y))
    joined = [str(a) + str(b) for a, b in zip(left.ravel(), right.ravel(), strict=True)]
    return _texts(joined, left.shape)


def _string_normalizer(node: Node, x: Any) -> np.ndarray:
    x = static(node, 0, x)
    get = node.attributes.get
    fold: Callable[[str], str] = str if get("is_case_sensitive", 0) else str.lower
    stops = {fold(word) for word in get("stopwords") or ()}
    case = {"LOWER": str.lower, "UPPER": str.upper}.get(get("case_change_action", "NONE"), str)
    kept = [case(str(word)) for word in x.ravel() if fold(str(word)) not in stops] or [""]
    return _texts(kept, (len(kept),) if x.ndim == 1 else (1, len(kept)))


def _string_split(node: Node, x: Any) -> tuple[np.ndarray, np.ndarray]:
    x = static(node, 0, x)
    delimiter = node.attributes.get("delimiter") or None
    most = node.attributes.get("maxsplit")
    parts = [str(text).split(delimiter, -1 if most is None else most) for text in x.ravel()]
    # Splitting an empty string gives no parts, also where Python finds an empty one.
    parts = [[] if part == [""] else part for part in parts]
    width = max(map(len, parts), default=0)
    padded = [word for part in parts for word in part + [""] * (width - len(part))]
    counts = np.array([len(part) for part in parts], np.int64).reshape(x.shape)
    return _texts(padded, (*x.shape, width)), counts


def _regex_full_match(node: Node, x: Any) -> np.ndarray:
    x = static(node, 0, x)
    try:
        pattern = re.compile(node.attributes["pattern"])
    except re.error as error:
        raise ConfigError(
            f"{where_is(node)}: the pattern {node.attributes['pattern']!r} is no expression that "
            f"Python knows: {error}"
        ) from error
    hits = [pattern.fullmatch(str(text)) is not None for text in x.ravel()]
    return np.array(hits, bool).reshape(x.shape)


def _grams(node: Node) -> list[tuple[int, np.ndarray]]:
    """Return for each n the number of the first n-gram of that length, and all of them ``[G, n]``."""
    get = node.attributes.get
    words = get("pool_strings")
    pool = np.array(get("pool_int64s")) if words is None else _texts(words, (len(words),))
    starts = [*node.attributes["ngram_counts"], len(pool)]
    found, first = [], 0
    for n, (low, high) in enumerate(itertools.pairwise(starts), 1):
        table = pool[low:high].reshape(-1, n)
        found.append((first, table))
        first += len(table)
    return found


def _tf_idf(node: Node, x: Any) -> Any:
    get: Any = node.attributes.get
    if isinstance(x, np.ndarray) and x.dtype.kind in "OSU":
        xp: Any = np
    else:
        (x,), xp = traced(node, x), jnp
    rows = x.reshape(1, -1) if x.ndim == 1 else x
    indexes = np.array(get("ngram_indexes"))
    counts: Any = xp.zeros((rows.shape[0], len(indexes)), np.float32)
    for n, (first, table) in enumerate(_grams(node), 1):
        if not get("min_gram_length") <= n <= get("max_gram_length") or not len(table):
            continue
        for step in range(1, 2 if n == 1 else get("max_skip_count") + 2):
            begins = np.arange(max(rows.shape[1] - (n - 1) * step, 0))
            windows = rows[:, begins[:, None] + np.arange(n) * step]
            gram = table if xp is np else jnp.asarray(table.astype(windows.dtype))
            hits = (windows[:, :, None] == gram[None, None]).all(-1).sum(1).astype(np.float32)
            if xp is np:
                counts[:, first : first + len(table)] += hits
            else:
                counts = counts.at[:, first : first + len(table)].add(hits)
    weights = np.array(get("weights") or np.ones(len(indexes)), np.float32)[None]
    if get("mode") == "IDF":
        counts = (counts > 0).astype(np.float32)
    if get("mode") != "TF":
        counts = counts * weights
    out = np.zeros((len(indexes), indexes.max() + 1), np.float32)
    out[np.arange(len(indexes)), indexes] = 1
    y = counts @ out
    return y[0] if x.ndim == 1 else y


OPERATORS: Mapping[str, Operator] = {
    "RegexFullMatch": _regex_full_match,
    "StringConcat": _string_concat,
    "StringNormalizer": _string_normalizer,
    "StringSplit": _string_split,
    "TfIdfVectorizer": _tf_idf,
}
