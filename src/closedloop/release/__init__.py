"""What serves, and how it changes."""
