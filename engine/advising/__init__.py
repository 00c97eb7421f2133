"""What advice is made of."""
