"""Comparison of a built model with stock transformers, layer by layer, and of each pass with what was before it."""
