"""`runtime tune`: a search for the settings that serve a workload best, by measuring one key after the other."""
