"""Grammars of requests: compiled, followed token by token, and told to a step as bitmasks."""
