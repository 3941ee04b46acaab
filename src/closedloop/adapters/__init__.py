"""One file per tool: the only place in the package that imports it."""
