"""torch.compile: lowering, cache and guard-free calls."""
