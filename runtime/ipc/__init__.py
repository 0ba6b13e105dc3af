"""Messages between web workers and the engine."""
