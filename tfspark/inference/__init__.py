"""Models in use: on DataFrames, RDDs and arrays, and as SQL functions."""
