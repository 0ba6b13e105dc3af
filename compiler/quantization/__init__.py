"""Checkpoints' formats and online quantization."""
