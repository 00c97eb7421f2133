"""Several processes, their memory, their speed."""
