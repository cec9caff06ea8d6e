"""Tar shards: their members, their samples, and what is wrong with them before a run."""
