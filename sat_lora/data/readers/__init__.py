"""How samples lie in a path: one module per way, named in `READERS`."""
