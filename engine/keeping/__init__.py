"""What a run keeps, and what proves it."""
