"""A student made ready to draw, and what draws with it: one command, one server."""
