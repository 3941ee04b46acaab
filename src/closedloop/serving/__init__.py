"""Predictions: the HTTP service, batch, stream and edge, all on one model contract and one prediction log."""
