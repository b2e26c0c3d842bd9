"""Reports of finished runs: tables and figures that can be read without the code."""
