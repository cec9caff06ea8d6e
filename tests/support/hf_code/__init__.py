"""A CogVLM of Hugging Face, written down from its layout: what `from_pretrained` takes from beside the weights."""
