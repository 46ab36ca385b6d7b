"""What runs the rounds of a solver: rows that end each for itself, eagerly or as a compiled graph."""
