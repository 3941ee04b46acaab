"""What evaluates expressions: one of two, and no code asks which."""

from __future__ import annotations

from closedloop.adapters import duckdb, spark

Engine = duckdb.Engine | spark.Engine
Session = duckdb.Session | spark.Session
