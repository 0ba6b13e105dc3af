"""The subcommands of `runtime`."""
