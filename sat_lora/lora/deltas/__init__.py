"""The arithmetic of one delta: its factors, its kernels, and how each kind of layer takes it."""
