"""The data sets behind `kd.data.sources.load`."""
