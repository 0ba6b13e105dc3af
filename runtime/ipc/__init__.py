"""Messages between web processes and the engine."""
