"""The real compilers divide every form for a TPU v5e 4x4 and for 8 H100, and send what they should."""

from pathlib import Path

import elsewhere
import pytest
from parallel_forms import CASES, PARAM_BYTES

HERE = Path(__file__).parent


def compiled(platform):
    rows = elsewhere.run(HERE / "compile_parallel_forms.py", platform)
    assert [row for row in rows if "error" in row] == []
    assert [row["case"] for row in rows] == [name for name, _ in CASES]
    return {row["case"]: row["collectives"] for row in rows}


def sent(rows, *kinds, group=None):
    """Add up the bytes of some kinds of collectives, in groups of one size."""
    return sum(
        size for kind, _, size, of in rows if (kind in kinds or not kinds) and group in (None, of)
    )


def about(size):
    """Allow for the loss, the metrics and what pads a buffer."""
    return pytest.approx(size, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_compilers_take_every_form_and_send_what_they_should(platform):
    rows = compiled(platform)
    # Every gradient once: nothing less would do.
    for name in ("data", "data_parallel fast"):
        assert sent(rows[name], "all-reduce") == sent(rows[name]) == about(PARAM_BYTES)
    # One slice of every device's sums out, and all slices back.
    exact = rows["data_parallel exact"]
    assert sent(exact, "all-to-all") == about(PARAM_BYTES)
    assert sent(exact, "all-gather", "all-reduce") == about(PARAM_BYTES)

    # Parameters come before each use, forward and backward; gradients go once. No activation moves.
    fsdp = rows["fsdp"]
    assert sent(fsdp, "reduce-scatter", "all-reduce") == about(PARAM_BYTES)
    assert PARAM_BYTES < sent(fsdp, "all-gather") < 4 * PARAM_BYTES
    # Without a word about activations they are divided by width, and sent around in every layer.
    assert sent(rows["fsdp, activations anyhow"]) > 10 * sent(fsdp)

    # Megatron: activations are added up within groups of 4, and no parameter is sent.
    tensor = rows["data x tensor"]
    assert sent(tensor, "all-reduce", group=4) > 4 * PARAM_BYTES
    assert sent(tensor, "all-gather", "all-to-all") == 0
    both = rows["fsdp x tensor"]
    assert sent(both, "all-reduce", group=4) > 4 * PARAM_BYTES
    assert 0 < sent(both, "reduce-scatter") < 1.05 * PARAM_BYTES / 4
    assert sent(rows["fsdp x expert"], "all-gather", group=4) > 0
