"""Folders of weights, SAT's and Hugging Face's: read at any model-parallel size, and written."""
