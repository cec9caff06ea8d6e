"""Adapters on disk: saved, loaded, inspected, combined, merged into a base."""
