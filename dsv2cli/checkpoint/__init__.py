"""Names and files become objects."""
