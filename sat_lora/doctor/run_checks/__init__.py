"""Checks of what surrounds a model: machine, packages, network, configuration, data, schedule."""
