"""Checkpoints on disk: Hugging Face directories and GGUF files to parameters, and back."""
