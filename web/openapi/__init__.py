"""What is served, as OpenAPI describes it, and a page that shows it."""
