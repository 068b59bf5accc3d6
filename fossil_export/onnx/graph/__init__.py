"""What a graph is: its files, its products with constant weights, where a module is in it, and how it is edited."""
