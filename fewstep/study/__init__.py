"""A blind study with people: planned, served, analysed."""
