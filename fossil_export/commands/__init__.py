"""The commands: each parses, calls the API and prints. No decisions."""
