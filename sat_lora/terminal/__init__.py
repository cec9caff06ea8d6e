"""What a person types and reads: options, warnings, progress, and the edge where an error is one line and a status."""
