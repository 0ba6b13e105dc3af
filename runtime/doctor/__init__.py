"""What `runtime doctor` looks at: this machine, and what a server's metrics tell."""
