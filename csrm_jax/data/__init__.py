"""Data: sources, encoding to packing atoms, and fixed-shape batches."""
