"""The embedded model and the code that made it."""
