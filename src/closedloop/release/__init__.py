"""The version that serves, and how it changes."""
