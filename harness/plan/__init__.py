"""A sweep → the least work that carries it out, and what that will cost."""
