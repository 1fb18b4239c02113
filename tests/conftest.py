"""Strictness for every test: 8 CPU devices, no silent promotion, warnings are errors."""

import os
import tempfile
from pathlib import Path

import hypothesis
import jax

# A first call compiles, so no example has a deadline; equal runs try equal examples.
hypothesis.settings.register_profile("fnml", deadline=None, derandomize=True)
hypothesis.settings.load_profile("fnml")

# The persistent cache is shared by the tests, by their subprocesses and by later runs.
_cache = os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "fnml-test-xla")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

jax.config.update("jax_compilation_cache_dir", _cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
