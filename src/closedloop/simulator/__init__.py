"""The `shop` data simulator."""
