"""Files that other programs read: one module for each format a student can be written in.

Each has `require()` (names the extra that is missing), `write(...)`, and a way to run what it wrote as a `Velocity`.
"""
