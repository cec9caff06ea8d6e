"""The ranks of a run: how a tensor is cut over them, how they find each other, and what they have to have alike."""
