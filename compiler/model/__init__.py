"""A folder of files becomes a wrapped model with weights."""
