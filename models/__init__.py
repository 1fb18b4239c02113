"""TODO"""

if not __name__.startswith("fnml."):
    raise ImportError("import fnml.models: as a top-level module it would be a second copy")
