"""CogVLM as a SAT model: network, checkpoints, text and image processing, generation."""

from sat_lora.cogvlm.checkpoint import load_cogvlm
from sat_lora.cogvlm.model import CogVLMModel, build_cogvlm

__all__ = ["CogVLMModel", "build_cogvlm", "load_cogvlm"]
