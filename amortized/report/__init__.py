"""What was measured, for a person: the table, the pictures and the page."""
