"""Passes over modules, before capture."""
