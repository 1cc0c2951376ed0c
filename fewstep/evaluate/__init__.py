"""Protocols, sets of images, metrics and statistics. What runs a network lies in `adapters`, which nothing here imports."""
