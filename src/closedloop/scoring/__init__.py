"""Predictions without HTTP: batch, stream and edge."""
