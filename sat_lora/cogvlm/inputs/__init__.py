"""From prompts, answers and pictures to the tensors that CogVLM reads."""
