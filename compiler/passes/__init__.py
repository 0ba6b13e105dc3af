"""Rewrites of the loaded model, each exact and checked numerically."""
