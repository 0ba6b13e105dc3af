"""Servers on a cluster of Ray: replicas, a front before them, which replica a request goes to, how many there are."""
