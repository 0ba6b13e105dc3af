"""Speculative decoding: proposers say which draft tokens, drafters when and how many."""
