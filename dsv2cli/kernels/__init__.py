"""Tensors in, tensors out: the arithmetic of the model, with no knowledge of configs or files."""
