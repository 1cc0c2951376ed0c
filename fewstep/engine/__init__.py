"""Plumbing of a run: state on disk, optimisers, averages, logs, and the loop that counts images."""
