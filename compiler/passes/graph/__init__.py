"""Passes over the traced graph."""
