"""A transformers model becomes one compiled step over paged KV memory."""
