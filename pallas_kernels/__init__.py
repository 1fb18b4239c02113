"""Custom kernels, with their references and derivatives. Empty so far: see the roadmap."""

if not __name__.startswith("fnml."):
    raise ImportError("import fnml.pallas_kernels: as a top-level module it would be a second copy")
