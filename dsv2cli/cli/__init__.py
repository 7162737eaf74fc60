"""The only floor that prints."""
