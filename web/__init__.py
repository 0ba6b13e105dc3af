"""The OpenAI-compatible HTTP surface: a Flask application that never imports torch."""
