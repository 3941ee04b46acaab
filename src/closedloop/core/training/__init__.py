"""From training rows to one calibrated pipeline."""
