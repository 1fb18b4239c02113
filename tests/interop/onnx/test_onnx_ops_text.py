import numpy as np
import pytest
from one_op import in_importer, in_onnxruntime, one_op, same

from fnml.core import ConfigError
from fnml.interop.onnx import from_onnx

WORDS = np.array(["Monday", "tuesday", "Wednesday", "TUESDAY"], object)


def text(op, inputs, outputs=(object,), opset=20, **attributes):
    """Compare with onnxruntime; strings are known while tracing, so there is no jit."""
    model = one_op(op, inputs, outputs, opset, **attributes)
    static = {f"i{i}": x for i, x in enumerate(inputs)}
    imported, params = from_onnx(model, static_inputs=static)
    got = imported.apply(params)
    got = got if isinstance(got, tuple) else (got,)
    for ours, theirs in zip(got, in_onnxruntime(model, inputs), strict=True):
        assert ours.shape == theirs.shape and (ours == theirs).all()


@pytest.mark.parametrize(
    ("case", "sensitive", "expected"),
    [
        ("NONE", 1, ["Monday", "Wednesday", "TUESDAY"]),
        ("NONE", 0, ["Monday", "Wednesday"]),
        ("LOWER", 1, ["monday", "wednesday", "tuesday"]),
        ("UPPER", 0, ["MONDAY", "WEDNESDAY"]),
    ],
)
def test_normalizer_drops_stop_words_before_it_changes_the_case(case, sensitive, expected):
    options = {"case_change_action": case, "is_case_sensitive": sensitive, "stopwords": ["tuesday"]}
    for words in (WORDS, WORDS[None]):
        model = one_op("StringNormalizer", [words], [object], 10, **options)
        imported, params = from_onnx(model, static_inputs={"i0": words})
        got = imported.apply(params)
        assert got.ndim == words.ndim and got.ravel().tolist() == expected


def test_concat_split_and_match_equal_onnxruntime():
    text("StringConcat", [WORDS[:, None], np.array(["-", "é"], object)])
    lines = np.array([["a,b,,c", "", "x"], ["one, two", ",", " y  z "]], object)
    for options in ({"delimiter": ","}, {"delimiter": ",", "maxsplit": 1}, {}):
        text("StringSplit", [lines], [object, np.int64], **options)
    text("RegexFullMatch", [WORDS], [bool], pattern=r"[A-Z][a-z]+day")


def test_a_pattern_that_python_cannot_read_is_refused():
    model = one_op("RegexFullMatch", [WORDS], [bool], 20, pattern="(")
    imported, params = from_onnx(model, static_inputs={"i0": WORDS})
    with pytest.raises(ConfigError, match=r"node 'node' .RegexFullMatch.: the pattern '\('"):
        imported.apply(params)


@pytest.mark.parametrize("mode", ["TF", "IDF", "TFIDF"])
def test_ngrams_equal_onnxruntime(mode):
    tokens = np.array([[1, 1, 3, 3, 3, 7], [8, 6, 7, 5, 6, 8]], np.int32)
    options = {
        "mode": mode,
        "min_gram_length": 1,
        "max_gram_length": 2,
        "max_skip_count": 3,
        "ngram_counts": [0, 4],
        "ngram_indexes": [0, 2, 1, 3, 4, 6, 5],
        "pool_int64s": [2, 3, 5, 4, 5, 6, 7, 8, 6, 7],
        "weights": [1.0, 0.5, 2.0, 3.0, 0.25, 1.5, 4.0],
    }
    same("TfIdfVectorizer", [tokens], opset=9, **options)
    words = tokens.astype(str).astype(object)
    strings = options | {"pool_strings": [str(i) for i in options.pop("pool_int64s")]}
    model = one_op("TfIdfVectorizer", [words], opset=9, **strings)
    imported, params = from_onnx(model, static_inputs={"i0": words})
    np.testing.assert_allclose(imported.apply(params), in_onnxruntime(model, [words])[0])


ML = "ai.onnx.ml"


def test_labels_equal_onnxruntime():
    keys = {"keys_int64s": [3, 1, 7], "values_floats": [0.5, -1.0, 2.0], "default_float": 9.0}
    x = np.array([[1, 3], [4, 7]], np.int64)
    model = one_op("LabelEncoder", [x], [np.float32], 2, ML, **keys)
    np.testing.assert_array_equal(in_importer(model, [x])[0], in_onnxruntime(model, [x])[0])


@pytest.mark.parametrize("how", ["SUM", "AVERAGE", "MIN", "MAX"])
def test_trees_equal_onnxruntime(how):
    rng = np.random.default_rng(0)
    # Three full trees with seven nodes each, of which the last four are leaves.
    trees, nodes = (x.ravel().tolist() for x in np.indices((3, 7)))
    leaf = [node > 2 for node in nodes]
    ends = [(t, n) for t, n in zip(trees, nodes, strict=True) if n > 2]
    model = one_op(
        "TreeEnsembleRegressor",
        [np.zeros((40, 3), np.float32)],
        [np.float32],
        1,
        ML,
        nodes_treeids=trees,
        nodes_nodeids=nodes,
        nodes_featureids=rng.integers(0, 3, 21).tolist(),
        nodes_values=rng.normal(size=21).tolist(),
        nodes_modes=["LEAF" if end else "BRANCH_LEQ" for end in leaf],
        nodes_truenodeids=[0 if n > 2 else 2 * n + 1 for n in nodes],
        nodes_falsenodeids=[0 if n > 2 else 2 * n + 2 for n in nodes],
        target_treeids=[t for t, _ in ends],
        target_nodeids=[n for _, n in ends],
        target_ids=rng.integers(0, 2, 12).tolist(),
        target_weights=rng.normal(size=12).tolist(),
        n_targets=2,
        base_values=[0.25, -1.0],
        aggregate_function=how,
    )
    x = rng.normal(size=(40, 3)).astype(np.float32)
    expected = in_onnxruntime(model, [x])[0]
    np.testing.assert_allclose(in_importer(model, [x])[0], expected, rtol=1e-5, atol=1e-6)


def test_features_equal_onnxruntime():
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    cases = [
        ("Scaler", {"offset": [1.0, 2.0, 3.0, 4.0], "scale": [0.5, 2.0, 1.0, 3.0]}),
        ("Normalizer", {"norm": "L1"}),
        ("Normalizer", {"norm": "L2"}),
        ("Binarizer", {"threshold": 0.25}),
        (
            "LinearRegressor",
            {"coefficients": [0.1, 0.2, 0.3, 0.4] * 2, "targets": 2, "intercepts": [1.0, -1.0]},
        ),
    ]
    for op, attributes in cases:
        model = one_op(op, [x], [np.float32], 1, ML, **attributes)
        expected = in_onnxruntime(model, [x])[0]
        np.testing.assert_allclose(in_importer(model, [x])[0], expected, rtol=1e-5, atol=1e-6)
