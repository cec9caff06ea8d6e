"""What lies in data paths, for people: counts, lengths, faults, and samples as they are trained on."""
