"""Samples become batches: which rank takes which of them at which step."""
