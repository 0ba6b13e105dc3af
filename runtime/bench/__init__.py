"""`runtime bench`: work, its arrivals, how it is sent or run, measures. Sending imports no torch."""
