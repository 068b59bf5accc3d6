"""What the Hub is asked itself, since its client has no public function for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fossil_export.storage.hub._errors import redacted

_LFS = "application/vnd.git-lfs+json"


def said_of_card(card: str) -> tuple[list[str], list[str]]:
    """What the Hub has against the metadata of a model card: errors, for which it refuses it, and warnings."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    response = get_session().post(
        f"{constants.ENDPOINT}/api/validate-yaml",
        json={"content": card, "repoType": "model"},
        headers=build_hf_headers(library_name="fossil-export"),
    )
    if response.status_code != 400:  # otherwise the answer says why
        hf_raise_for_status(response)
    found = response.json()
    errors, warnings = (_messages(found.get(kind)) for kind in ("errors", "warnings"))
    if not errors:
        hf_raise_for_status(response)
    return errors, warnings


def held(repo_id: str, uploads: Sequence[Any], branch: str | None) -> set[str]:
    """SHA-256 of those contents (UploadInfo) that the Hub has for a repository: of them, git-lfs' batch API asks for
    no upload. `branch` is the one that must be open to writing, None for any."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    body: dict[str, Any] = {
        "operation": "upload",
        "transfers": ["basic", "multipart"],
        "objects": [{"oid": upload.sha256.hex(), "size": upload.size} for upload in uploads],
        "hash_algo": "sha256",
    }
    if branch is not None:
        body["ref"] = {"name": branch}
    headers = build_hf_headers(library_name="fossil-export", headers={"Accept": _LFS, "Content-Type": _LFS})
    response = http_backoff(
        "POST", f"{constants.ENDPOINT}/{repo_id}.git/info/lfs/objects/batch", headers=headers, json=body
    )
    hf_raise_for_status(response)
    return {found["oid"] for found in response.json()["objects"] if not ("error" in found or found.get("actions"))}


def _messages(found: Any) -> list[str]:
    told = (redacted(" ".join(str(one["message"]).split())) for one in found or [] if one.get("message"))
    return list(told)
