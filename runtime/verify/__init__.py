"""What `runtime verify` compares and says."""
