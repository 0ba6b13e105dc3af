"""A folder of files becomes captured modules with weights."""
