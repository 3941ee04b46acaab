"""The server side of HTTP."""
