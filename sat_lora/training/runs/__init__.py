"""The run folder: its lock, its logs and pictures, its room on the disk."""
