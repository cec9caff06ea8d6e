"""Answers that a model generates to samples: made, measured, kept and shown."""
