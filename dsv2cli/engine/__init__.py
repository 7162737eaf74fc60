"""Logits to token, tokens to tokens, messages to text."""
