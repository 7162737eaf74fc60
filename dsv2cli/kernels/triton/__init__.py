"""The same arithmetic in Triton, for GPUs: few new tokens by matrix-vector kernels, many by tensor cores."""
