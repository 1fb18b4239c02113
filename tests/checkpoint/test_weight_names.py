import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import abstract, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st

from fnml import core, models
from fnml.checkpoint import (
    WeightRule,
    export_weights,
    import_weights,
    load_torch,
    save_torch,
)
from fnml.checkpoint._rearrange import Axes
from fnml.core import CheckpointError, ConfigError, ShapeError

# A GPT of ours under the names and layouts that a PyTorch module would have.
GPT = [
    WeightRule("embed.weight", "embed/table"),
    WeightRule("blocks.{i}.attn.{p}_proj.weight", "layers/attention/{p}", "(h k) d -> d h k"),
    WeightRule("blocks.{i}.mlp.{p}.weight", "layers/mlp/{p}", "out in -> in out"),
    WeightRule("blocks.{i}.{norm}.weight", "layers/{norm}/scale"),
    WeightRule("norm.weight", "norm/scale"),
    WeightRule("head.weight", "head/kernel", "v d -> d v"),
    WeightRule("{*rest}.inv_freq", None),
]
GPT.insert(
    1, WeightRule("blocks.{i}.attn.out_proj.weight", "layers/attention/out", "d (h k) -> h k d")
)


@pytest.fixture(scope="module")
def params():
    config = models.GPTConfig(vocab=11, width=8, layers=3, heads=2, context=4)
    return core.init(models.gpt(config).spec, jax.random.key(0))


def test_a_gpt_goes_out_and_comes_back(params, tmp_path):
    theirs = export_weights(params, GPT)
    query = np.asarray(params["layers"]["attention"]["query"])
    out = np.asarray(params["layers"]["attention"]["out"])
    for i in range(3):
        weight = theirs[f"blocks.{i}.attn.query_proj.weight"]
        # x @ weight.T is what a PyTorch layer computes, heads side by side.
        np.testing.assert_array_equal(weight.T.reshape(8, 2, 4), query[i])
        weight = theirs[f"blocks.{i}.attn.out_proj.weight"]
        np.testing.assert_array_equal(weight, out[i].reshape(8, 8).T)
    assert theirs["head.weight"].shape == (11, 8)
    assert len(theirs) == 3 + 3 * 9
    path = tmp_path / "model.pt"
    save_torch(path, theirs)
    loaded = {**load_torch(path), "blocks.0.rotary.inv_freq": np.ones(2)}
    assert_same_bits(import_weights(loaded, GPT, abstract(params)), params)


def test_experts_in_layers_are_two_leading_axes():
    rules = [WeightRule("h.{layer}.e.{expert}.w", "layers/experts")]
    ours = {"layers": {"experts": jnp.arange(24.0).reshape(2, 3, 4)}}
    theirs = export_weights(ours, rules)
    np.testing.assert_array_equal(theirs["h.1.e.2.w"], [20, 21, 22, 23])
    assert_same_bits(import_weights(theirs, rules, ours), ours)


def test_the_first_rule_decides_and_a_star_keeps_the_rest():
    rules = [WeightRule("skip.{*x}", "old/{*x}"), WeightRule("model.{*x}", "{*x}")]
    ours = {"old": {"a": jnp.ones(1)}, "new": {"a": [jnp.zeros(2)]}}
    theirs = export_weights(ours, rules)
    assert theirs.keys() == {"skip.a", "model.new.a.0"}
    assert_same_bits(import_weights(theirs, rules, ours), ours)


def test_all_mismatches_are_listed_with_the_nearest_names(params):
    theirs = dict(export_weights(params, GPT))
    theirs["embed.wieght"] = theirs.pop("embed.weight")
    theirs["blocks.1.mlp.up.weight"] = theirs["blocks.1.mlp.up.weight"].T
    theirs["norm.weight"] = theirs["norm.weight"].astype(np.float16)
    del theirs["blocks.2.mlp.down.weight"]
    theirs["blocks.3.attn.query_proj.weight"] = np.zeros((8, 8), np.float32)
    with pytest.raises(CheckpointError) as caught:
        import_weights(theirs, GPT, params)
    text = str(caught.value)
    for part in (
        "embed.weight: missing, for embed/table. Did you mean 'embed.wieght'?",
        "embed.wieght: no path of the target takes it. Did you mean 'embed.weight'?",
        "blocks.2.mlp.down.weight: missing, for layers/mlp/down.",
        "blocks.3.attn.query_proj.weight: no path of the target takes it.",
        "blocks.1.mlp.up.weight: has shape",
        "norm.weight: has dtype float16, expected float32; cast=True would round it",
    ):
        assert part in text
    assert len(text.splitlines()) == 7


def test_a_cast_has_to_be_asked_for():
    rules = [WeightRule("w", "w")]
    half = {"w": np.array([1.5, 2.5], np.float16)}
    target = {"w": jnp.zeros(2)}
    with pytest.raises(CheckpointError, match="cast=True"):
        import_weights(half, rules, target)
    np.testing.assert_array_equal(import_weights(half, rules, target, cast=True)["w"], half["w"])
    with pytest.raises(CheckpointError, match="dtype int32, expected float32"):
        import_weights({"w": np.zeros(2, np.int32)}, rules, target, cast=True)


def test_a_turned_matrix_is_recognised():
    with pytest.raises(CheckpointError, match="axes='a b -> b a' would turn it"):
        import_weights({"w": np.zeros((2, 3))}, [WeightRule("w", "w")], {"w": np.zeros((3, 2))})


def test_tied_weights_come_in_but_do_not_go_out():
    rules = [WeightRule("w", "embed"), WeightRule("w", "head", "a b -> b a")]
    w = np.arange(6, dtype=np.float32).reshape(2, 3)
    tied = import_weights({"w": w}, rules, {"embed": jnp.zeros((2, 3)), "head": jnp.zeros((3, 2))})
    np.testing.assert_array_equal(tied["head"], w.T)
    with pytest.raises(ShapeError, match="head: w is also the name of another array"):
        export_weights(tied, rules)


def test_paths_without_a_rule_are_listed():
    rules = [WeightRule("a.{i}", "kernel"), WeightRule("b", "bias", "(x y) -> x y")]
    with pytest.raises(ShapeError) as caught:
        export_weights({"kernle": np.zeros(2), "kernel": np.zeros(()), "bias": np.zeros(3)}, rules)
    text = str(caught.value)
    assert "kernle: no rule makes this path. Did you mean 'kernel'?" in text
    assert "kernel: has shape (), and ['i'] have to be leading axes" in text
    assert "bias: has shape (3,), expected 2 axes" in text


@pytest.mark.parametrize(
    ("rule", "fault"),
    [
        (WeightRule("a", "b.{i}"), "nothing in theirs says"),
        (WeightRule("a.{i}.{i}", "b"), "stands twice"),
        (WeightRule("a.{*i}", "b"), "cannot be stacked"),
        (WeightRule("a", "b", "x y"), "0 arrows"),
        (WeightRule("a", "b", "x y -> x"), "each axis once"),
        (WeightRule("a", "b", "x x -> x x"), "each axis once"),
        (WeightRule("a", "b", "x + y -> x y"), "expected names"),
    ],
)
def test_a_wrong_table_is_refused(rule, fault):
    with pytest.raises(ConfigError, match=fault):
        import_weights({}, [rule], {})


@given(st.permutations("abcd"), st.permutations("abcd"), st.integers(0, 3), st.data())
def test_axes_read_backwards_give_the_same_bits(before, after, cut, data):
    sizes = data.draw(st.fixed_dictionaries({name: st.integers(1, 3) for name in "abcd"}))
    joined = " ".join(before[:cut]) + (" (" + " ".join(before[cut:]) + ")" if cut < 4 else "")
    axes = Axes.parse(f"{joined} -> {' '.join(after)}")
    ours = np.arange(np.prod(list(sizes.values()))).reshape([sizes[name] for name in after])
    theirs = axes.back(ours)
    # Against einsum, which turns axes too, and plain reshape.
    turned = np.einsum(f"{''.join(after)}->{''.join(before)}", ours)
    np.testing.assert_array_equal(theirs, turned.reshape(*turned.shape[:cut], -1))
    np.testing.assert_array_equal(axes.there(theirs, ours.shape), ours)
