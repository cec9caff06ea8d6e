"""LoRA on any SAT model, in memory: what is adapted, the mixin and its hook. It knows no CogVLM and no file."""
