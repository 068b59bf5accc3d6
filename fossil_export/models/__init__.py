"""What an architecture is: names in files and in the model, ties, heads; asked of transformers or its table."""
