"""Passes over the captured graph."""
