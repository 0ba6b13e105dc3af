"""What a step begins with: block tables, positions and token ids from a step's metadata."""
