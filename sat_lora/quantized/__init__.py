"""Weights that are held in fewer bits, as tensors that stand where the whole ones stood."""
