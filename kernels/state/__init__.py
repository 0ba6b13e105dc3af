"""Layers that keep a state of fixed size for each sequence: convolutions, delta rules, state space models."""
