"""Unquantised linears of few rows, norms and gates."""
