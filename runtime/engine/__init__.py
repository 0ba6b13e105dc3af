"""The engine loop and what it counts."""
