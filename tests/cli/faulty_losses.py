"""Losses with one planted fault each, as modules that a user might have written."""

_HEAD = """
import jax, jax.numpy as jnp, numpy as np
from jax import lax
from fnml import Mean, Metrics

def example():
    rng = np.random.default_rng(0)
    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2]), jnp.float32)
    params = {"layers": {"kernel": normal(3, 4, 4), "scale": jnp.ones((3, 4))},
              "head": {"kernel": normal(4, 1)}}
    batch = {"x": rng.normal(size=(8, 4)).astype(np.float32),
             "y": rng.normal(size=8).astype(np.float32),
             "mask": (np.arange(8) != 2).astype(np.float32)}
    batch["mask"][:2] = 0
    return params, batch

def layer(x, p):
    return jnp.tanh(x @ p["kernel"]) * p["scale"][None], None

def predict(params, batch):
    x, _ = lax.scan(layer, batch["x"], params["layers"])
    return (x @ params["head"]["kernel"])[:, 0]

def loss_fn(params, batch, key):
    error = Mean.of((predict(params, batch) - batch["y"]) ** 2, batch["mask"])
    return error.value, Metrics(error.weight, {"error": error})
"""


def _with(*changes: tuple[str, str], more: str = "") -> str:
    source = _HEAD
    for old, new in changes:
        assert old in source, old
        source = source.replace(old, new)
    return source + more


SOUND = _HEAD

# name -> (module, the check that finds it, what it says)
FAULTS: dict[str, tuple[str, str, str]] = {
    "wrong_vjp": (
        _with(
            ("jnp.tanh(x @ p", "squash(x @ p"),
            more="""
@jax.custom_vjp
def squash(x):
    return jnp.tanh(x)

squash.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g * (1 - 0.9 * jnp.tanh(x) ** 2),))
""",
        ),
        "gradient",
        r"the gradient says .* the loss's slope is",
    ),
    "nan_in_a_scanned_layer": (
        _with(
            ('"scale": jnp.ones((3, 4))', '"scale": jnp.ones((3, 4)).at[2, 1].set(-1.0)'),
            ('* p["scale"][None]', '* jnp.sqrt(p["scale"])[None]'),
        ),
        "finite",
        r"(?s)sqrt made the first NaN, at .*\(layer\).*in turn 2 of its loop.*layers/scale",
    ),
    "nan_only_in_the_gradient": (
        _with(
            ("jnp.tanh(x @ p", "root(x @ p"),
            more="""
def root(x):
    return jnp.where(x > 0, jnp.sqrt(x), 0.0)
""",
        ),
        "finite",
        r"(?s)sqrt made the first NaN, at .*\(root\)",
    ),
    "overflow_only_in_float16": (
        _with(
            ('jnp.tanh(x @ p["kernel"])', 'energy(x, p["kernel"])'),
            more="""
def energy(x, kernel):
    wide = (300.0 * x) @ (300.0 * kernel)
    return wide / 9e4
""",
        ),
        "float16",
        r"(?s)dot_general made the first infinity, at .*\(energy\)",
    ),
    "dead_parameter": (
        _with(('x @ params["head"]["kernel"]', 'x @ lax.stop_gradient(params["head"]["kernel"])')),
        "dead parameter",
        r"head/kernel: the gradient is exactly 0",
    ),
    "exploding_activation": (
        _with(('jnp.tanh(x @ p["kernel"])', '40.0 * (x @ p["kernel"])')),
        "activations",
        r"reaches .* in layer [12]",
    ),
    "unused_batch_field": (
        _with((', batch["mask"])', ")")),
        "batch field",
        r"mask: neither loss nor metrics read it",
    ),
    "silently_broadcast_loss": (
        _with(
            ('["kernel"])[:, 0]', '["kernel"])'),
            ('** 2, batch["mask"])', '** 2, batch["mask"][:, None] * jnp.ones((8, 8)))'),
        ),
        "broadcast",
        r"sub at .*\(loss_fn\) makes \[8, 8\] of shapes",
    ),
    "key_used_twice": (
        _with(
            ("return params, batch", "return params, batch, jax.random.key(0)"),
            (
                "    error = Mean",
                "    noise = sum(jax.random.normal(key, (8,)) for _ in range(2))\n    error = Mean",
            ),
            ('- batch["y"]', '- batch["y"] + 0.1 * noise'),
        ),
        "key",
        r"a key is used twice",
    ),
    "key_ignored": (
        _with(("return params, batch", "return params, batch, jax.random.key(0)")),
        "key",
        r"given a key and ignores it",
    ),
    "float64_batch": (
        _with(('"y": rng.normal(size=8).astype(np.float32)', '"y": rng.normal(size=8)')),
        "dtypes",
        r"y: float64, which JAX narrows",
    ),
    "bytes_that_wrap": (
        _with(
            (
                '"x": rng.normal(size=(8, 4)).astype(np.float32)',
                '"x": rng.integers(0, 256, (8, 4)).astype(np.uint8)',
            ),
            (
                'batch["x"], params',
                '(batch["x"] - jnp.uint8(128)).astype(jnp.float32) / 128, params',
            ),
        ),
        "dtypes",
        r"sub at .*\(predict\) computes in uint8, which wraps",
    ),
    "constant_baked_in": (
        _with(
            ('* p["scale"][None]', '* p["scale"][None] + 1e-6 * jnp.sum(TABLE)'),
            more="\nTABLE = np.ones((512, 1024), np.float32)\n",
        ),
        "constants",
        r"float32\[512, 1024\] of 2.0 MiB",
    ),
    "weight_of_another_mean": (
        _with(("Metrics(error.weight, ", "Metrics(jnp.float32(8), ")),
        "weight",
        r"do not merge to the whole",
    ),
}
