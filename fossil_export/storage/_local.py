"""Models and adapters on this machine."""

from __future__ import annotations

from pathlib import Path

from fossil_export.checkpoints._checkpoint import hub_revision
from fossil_export.checkpoints._folder import LocalFolder
from fossil_export.errors import FossilExportError
from fossil_export.storage._origin import Origin, Storage
from fossil_export.storage._paths import exists, expanded
from fossil_export.storage.hub._names import is_hub_id


class LocalStorage(Storage):
    """Paths that exist."""

    def find(self, given: str | Path, error: type[FossilExportError], what: str) -> Origin | None:
        """Raises `error` for a path that exists and may not be read."""
        text, path = str(given), expanded(given, error)
        if not exists(path, given, error):
            return None
        is_id = is_hub_id(text)
        note = f"{text}: the {what} in this folder is taken, not the Hub's; write hf://{text} for that one"
        is_clear = what == "adapter" and (path / "adapter_config.json").is_file()
        notes = (note,) if is_id and isinstance(given, str) and path.is_dir() and not is_clear else ()
        name = f"./{text}" if is_id else text
        folder, file = (path, None) if path.is_dir() else (path.parent, path.name)
        return Origin(name, LocalFolder(folder), file, hub_revision(path), notes=notes, is_path=True)
