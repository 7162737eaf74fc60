"""The benchmarks of the paper, a file each: what is asked, which examples stand before it, what is right."""
