"""What is measured at the start: peak memory, the KV cache's budget, latency of steps."""
