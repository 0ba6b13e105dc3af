"""Quantised weights: their layouts, GEMMs and GEMVs, and dynamic activation quantization."""
