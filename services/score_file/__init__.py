"""Offline scoring: a data set of prompts and responses becomes parquet of what a teacher says of every token."""
