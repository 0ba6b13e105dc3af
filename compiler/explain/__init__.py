"""What a configuration costs, before anything is loaded and after: memory, a step's least time, what the passes found."""
