"""Passes over modules, before tracing."""
