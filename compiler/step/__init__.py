"""One step on a device: inputs, staging, state, sampling, CUDA graphs."""
