"""Protocols, outcomes and statistics of evaluation. Nothing here runs a network; `stages.evaluate` does."""
