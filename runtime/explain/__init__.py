"""What `runtime explain` says: an explanation of a configuration, as a text, as JSON, as a picture."""
