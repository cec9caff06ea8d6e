"""How anything is read from a disk and gets onto one: foreign files within limits, folders that are replaced whole."""
