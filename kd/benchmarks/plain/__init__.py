"""Peers that are no package: what others publish, written by us as plainly as it is stated.

Where a comparison is with one of these, the page of performance says "written plainly".
"""
