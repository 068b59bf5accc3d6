"""`python -m fossil_export`."""

from fossil_export._isolation import forget_current_folder

forget_current_folder(started_by_module=True)

from fossil_export.cli import main  # noqa: E402

main(prog_name="fossil-export")
