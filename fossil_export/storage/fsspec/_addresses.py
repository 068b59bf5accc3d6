"""URLs of fsspec's file systems, told from paths and names without importing fsspec."""

from __future__ import annotations

import re

from fossil_export.errors import FossilExportError

SCHEMES = (
    "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "tos", "file", "local", "memory", "hdfs",
    "webhdfs", "arrow_hdfs", "sftp", "ssh", "ftp", "smb", "webdav", "lakefs", "dbfs", "box", "dropbox", "gdrive",
)  # fmt: skip
"""Those whose URLs are taken for addresses, whatever paths there are here; others only if nothing else is found."""

LOCAL = ("file", "local")
OTHERS = ("hf", "http", "https")
"""The Hub's."""

_SCHEME = re.compile(r"([a-z][a-z0-9+._-]*)://", re.IGNORECASE)
_SECRETS = re.compile(
    r"(?<=://)[^\s/@]*:[^\s/@]*(?=@)|(?<=\?)[^\s'\">]+|(?<=Bearer )\S+|\b(?:AKIA|ASIA)[A-Z0-9]{8,}"
    r"|(?:(?:sig|Signature|AccountKey|SharedAccessSignature|password|secret|token)=)[^\s&'\">]+"
)


def scheme_of(text: str) -> str | None:
    """What stands before `://`, in small letters; None for what is no URL."""
    found = _SCHEME.match(text)
    return found[1].lower() if found else None


def is_object_address(text: str) -> bool:
    """Whether `text` is a URL of one of `SCHEMES` that is on no disk of this machine."""
    return scheme_of(text) in SCHEMES and scheme_of(text) not in LOCAL


def redacted(text: str) -> str:
    """`text` without passwords, keys, and the queries of addresses, which may be signed."""
    return _SECRETS.sub("…", text)


def check_address(text: str, error: type[FossilExportError]) -> None:
    """Raise `error` for a URL that has what must not be in records: a password or a query, which may be signed; and for
    one that is none."""
    address = _SCHEME.sub("", text, count=1)
    shown = redacted(text)
    authority = address.split("/", 1)[0]
    if ":" in authority.rpartition("@")[0]:
        raise error(
            f"{shown}: has a password in it, and addresses are written into records; leave it out, and give it to "
            f"fsspec by its configuration (FSSPEC_{(scheme_of(text) or '').upper()}_… or ~/.config/fsspec)"
        )
    if "?" in text or "::" in text:
        raise error(
            f"{shown}: has a query or is a chain of addresses; name the folder itself, and give what reading it takes "
            "to fsspec by its configuration"
        )
    if not address.strip("/") or "//" in address.strip("/") or {".", ".."} & set(address.split("/")):
        raise error(f"{shown}: names no folder or file; write {scheme_of(text)}://bucket/folder")
