"""An OpenAI-compatible server of one base and its adapters."""
