"""The commands of `sat-lora` that work on adapters alone."""
