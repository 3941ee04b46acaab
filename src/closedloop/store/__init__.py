"""The operations store: predictions, outcomes, checks, journal and deployment row."""
