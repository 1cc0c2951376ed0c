"""A rendered world of simple shapes with exact ground truth: what a prompt asks for can be checked without a learned judge."""
