"""OpenAI's /v1/responses: read as a chat, answered in items, stored for a while."""
