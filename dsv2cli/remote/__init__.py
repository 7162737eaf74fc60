"""A model that runs elsewhere, asked by OpenAI's protocol."""
