"""The state of the loop: for people, for Prometheus, and for the operator who connects the services."""
