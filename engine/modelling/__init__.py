"""A model before it trains: what it consists of, what it may bring along."""
