"""CogVLM's network on SAT's transformer: the published parameter names, one graph whatever a batch holds."""
