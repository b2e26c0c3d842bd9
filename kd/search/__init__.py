"""Search over architectures on the host, in NumPy: what a score or a predictor says is its eyes."""
