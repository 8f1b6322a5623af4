"""Rows: where they come from, how they are stored, which of them make a batch."""
