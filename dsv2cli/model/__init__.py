"""What a DeepSeek-V2 model is."""
