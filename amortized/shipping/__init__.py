"""A trained solver at work: loaded, with a certificate for each answer, exported, served, and over 10^8 contexts."""
