"""The frozen prefix: found, captured, fed."""
