"""What the Hub is asked itself, since its client has no public function for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fossil_export.errors import HubError
from fossil_export.storage.hub import _client as client
from fossil_export.storage.hub._errors import endpoint, redacted

_LFS = "application/vnd.git-lfs+json"


def said_of_card(card: str) -> tuple[list[str], list[str]]:
    """What the Hub has against the metadata of a model card: errors, for which it refuses it, and warnings."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    response = get_session().post(
        f"{constants.ENDPOINT}/api/validate-yaml",
        json={"content": card, "repoType": "model"},
        headers=build_hf_headers(library_name=client.LIBRARY),
    )
    if response.status_code != 400:  # otherwise the answer says why
        hf_raise_for_status(response)
    found = response.json()
    errors, warnings = (_messages(found.get(kind)) for kind in ("errors", "warnings"))
    if not errors:
        hf_raise_for_status(response)
    return errors, warnings


def refuse_owner(repo_id: str, who: Mapping[str, Any]) -> None:
    """Raise HubError for a repository that `who`, as the Hub tells of a token's user, may not make. What a token of
    another kind may do is not told in full."""
    token = dict((who.get("auth") or {}).get("accessToken") or {})
    tokens = f"{endpoint()}/settings/tokens"
    if token.get("role") == "read":
        raise HubError(
            f"{repo_id}: your token may only read; take one with write access from {tokens} and log in with "
            "`hf auth login`"
        )
    owner, name = repo_id.partition("/")[0], str(who["name"])
    writing = [org["name"] for org in who.get("orgs") or [] if org.get("roleInOrg") != "read"]
    if token.get("role") == "write" and owner.lower() not in map(str.lower, [name, *writing]):
        raise HubError(
            f"{repo_id}: is not there, and {name} may not make it for {owner}; write {name}/… or the name of a "
            "repository that you may write to"
        )


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
    headers = build_hf_headers(library_name=client.LIBRARY, headers={"Accept": _LFS, "Content-Type": _LFS})
    response = http_backoff(
        "POST", f"{constants.ENDPOINT}/{repo_id}.git/info/lfs/objects/batch", headers=headers, json=body
    )
    hf_raise_for_status(response)
    return {found["oid"] for found in response.json()["objects"] if not ("error" in found or found.get("actions"))}


def _messages(found: Any) -> list[str]:
    told = (redacted(" ".join(str(one["message"]).split())) for one in found or [] if one.get("message"))
    return list(told)
