"""Tokens in, tokens out: scheduling, block pool, engine loop, configuration and commands."""
