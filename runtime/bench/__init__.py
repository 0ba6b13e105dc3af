"""`runtime bench`: work, when it arrives, how it is sent or run, and what was measured. No file of it imports torch but `offline`."""
