"""Generation: a prompt's pass, then a token at a time, with a static cache."""
