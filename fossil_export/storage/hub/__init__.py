"""Models and adapters on the Hub: their names, their files, and what its refusals mean."""
