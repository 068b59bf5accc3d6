"""`python -m fossil_export`."""

from fossil_export.cli import main

main(prog_name="fossil-export")
