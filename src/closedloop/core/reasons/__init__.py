"""Reasons: how much each feature moves a raw score, exactly, by Shapley values."""
