"""Anthropic's /v1/messages: read as a chat, answered in content blocks."""
