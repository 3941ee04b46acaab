"""The versions that serve, and their download and checks."""
