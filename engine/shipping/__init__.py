"""What a finished run is turned into."""
