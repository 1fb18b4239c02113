"""On TPUs and GPUs no model is worse than a textbook's, by what their own compilers make of both."""

import sys
from pathlib import Path

import elsewhere
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnml

FORMS = Path(fnml.__file__).resolve().parents[1] / "benchmarks" / "forms"
pytestmark = pytest.mark.skipif(not FORMS.is_dir(), reason="benchmarks are in the repository only")

FIGURES = ("flops", "bytes", "xla", "temporaries")
SLACK = 1.02
"""What no figure exceeds: a copy of a bias here or there, and the alignment of buffers."""


def small():
    sys.path.append(str(FORMS))
    try:
        import rows
    finally:
        sys.path.remove(str(FORMS))
    return rows.small()


@pytest.mark.parametrize("name", ["gpt", "cnn", "resnet", "encoder"])
def test_both_forms_compute_the_same(name):
    row, rng = small()[name], np.random.default_rng(0)
    params = fnml.init(row.spec, jax.random.key(0))
    batch = [
        jnp.asarray(rng.integers(0, row.below, x.shape) if x.dtype == jnp.int32 else
                    rng.normal(size=x.shape), x.dtype)
        for x in row.batch
    ]  # fmt: skip
    got = jax.tree.leaves(jax.jit(row.ours)(params, *batch))
    # The textbook leaves promotion to JAX.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        want = jax.tree.leaves(jax.jit(row.textbook)(params, *batch))
    for a, b in zip(got, want, strict=True):
        # float32, some 20 products deep; a gradient that cancels keeps fewer digits.
        assert np.linalg.norm(np.ravel(a - b)) <= row.tolerance * max(
            np.linalg.norm(np.ravel(b)), 1e-3
        )


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_no_model_is_worse_than_the_textbooks(platform):
    found = elsewhere.run(FORMS / "worker.py", platform)
    assert set(found) == {"gpt", "cnn", "resnet", "encoder", "planted"}
    # What the comparison is for: convolutions as they are on a CPU, and what it says of them.
    planted = found.pop("planted")
    assert worse(planted)
    assert {name: worse(row) for name, row in found.items() if worse(row)} == {}


def worse(row):
    """Return the figures in which fnml's form is worse, with both sides."""
    ours, plain = row["fnml"], row["textbook"]
    pairs = {key: (ours[key], plain[key]) for key in FIGURES if ours[key] is not None}
    return {key: pair for key, pair in pairs.items() if pair[0] > SLACK * pair[1]}
