"""What the card says of each kind of artifact: one file a kind, and their table."""
