"""Sums and rows of several processes that compute one model together."""
