"""TODO"""

if not __name__.startswith("fnml."):
    raise ImportError("import fnml.transforms: as a top-level module it would be a second copy")
