"""Data sources, input pipelines and augmentations."""
