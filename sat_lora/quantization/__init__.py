"""Quantised bases: which layers of a SAT model hold their weights in fewer bits, and how they come to do so."""
