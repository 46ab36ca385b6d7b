"""What a solution lacks at most: an upper bound on ``L(b; a) - min_b L(b; a)`` of each row, with its kind."""
