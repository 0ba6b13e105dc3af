"""n-gram proposer and verification of draft tokens, on the device."""
