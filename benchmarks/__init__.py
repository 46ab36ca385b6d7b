"""Side by side with what others would use; each prints a table and writes JSON."""
