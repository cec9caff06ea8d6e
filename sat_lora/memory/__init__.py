"""The bytes of a step: estimated without a GPU, and measured."""
