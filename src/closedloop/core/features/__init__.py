"""From source rows to features and labels."""
