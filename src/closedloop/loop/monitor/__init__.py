"""The monitor: outcomes, checks, and reports for people."""
