"""The engines that evaluate expressions: callers need not ask which one they have."""

from __future__ import annotations

from closedloop.adapters import duckdb, spark

Engine = duckdb.DuckEngine | spark.SparkEngine
Session = duckdb.DuckSession | spark.SparkQueries
