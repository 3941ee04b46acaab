"""Tables: sources, Parquet, files and database tables by the chunk."""
