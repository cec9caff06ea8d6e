"""What one record says, by the layout of its keys: one module per layout, named in `registry`."""
