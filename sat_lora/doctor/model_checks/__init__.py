"""Checks of a model with adapters: what trains, what a gradient reaches, what the ranks share."""
