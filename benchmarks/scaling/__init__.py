"""What training CogVLM on many GPUs costs, computed: bytes between the ranks, seconds, and memory of each rank.

The formulas are functions of the sizes of the model, and tests count what the code really sends against them.
"""
