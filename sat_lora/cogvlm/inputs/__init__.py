"""Prompts, answers and pictures become the tensors that CogVLM reads."""
