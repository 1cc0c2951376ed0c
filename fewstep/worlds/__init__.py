"""Worlds small enough that the right answer is known."""
