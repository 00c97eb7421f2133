"""Rows from their place to a batch."""
