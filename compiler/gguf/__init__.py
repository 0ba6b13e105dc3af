"""A GGUF file becomes a folder as transformers reads it."""
