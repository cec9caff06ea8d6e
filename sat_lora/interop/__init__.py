"""What takes the place of other LoRA implementations for SAT models."""
