"""dsv2: the DeepSeek-V2 family on your own machine."""
