"""Pure functions: no I/O, no clock, no environment; arguments are never mutated."""
