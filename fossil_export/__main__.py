"""`python -m fossil_export`."""

from fossil_export._isolation import forget_current_folder

forget_current_folder(started_by_module=True)

from fossil_export._start import main  # noqa: E402

main()
