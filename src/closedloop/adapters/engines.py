"""What evaluates expressions: one of two, and no code asks which."""

from __future__ import annotations

from closedloop.adapters import duckdb, spark

Engine = duckdb.DuckEngine | spark.SparkEngine
Session = duckdb.DuckSession | spark.SparkQueries
