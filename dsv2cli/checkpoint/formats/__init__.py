"""The weights of other programs: a reader each, which gives named tensors as codes."""
