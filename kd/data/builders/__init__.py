"""The data sets behind `kd.data.catalogue.load`."""
