"""How files and folders appear whole or not at all, and what is left of a killed process goes. All writing is here."""
