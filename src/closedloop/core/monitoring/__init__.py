"""Whether a model still holds."""
