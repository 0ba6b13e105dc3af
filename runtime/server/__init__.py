"""The processes of a server: supervisor, engine process, compile process."""
