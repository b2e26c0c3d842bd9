"""The assertable statements of each paper, as rows of numbers. Run by `kd.theory.verify`."""
