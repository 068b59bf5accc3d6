"""What scale.py is made of: real shapes as files of holes, the work in a plan, what it costs, the tables."""
