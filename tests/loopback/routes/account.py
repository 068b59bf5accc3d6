"""Who asks, and what they may have or make."""

from __future__ import annotations

from typing import Any

from loopback.call import Call, json_reply
from loopback.git import Refusal
from loopback.names import check_repo
from loopback.routes.card import said_of


def whoami(call: Call) -> Any:
    if call.user is None:
        raise Refusal(401, "Invalid username or password.")
    return call.hub.accounts.told(call.user)


def harnesses(call: Call) -> Any:
    return {"standardEnvVars": [], "harnesses": {}}


def create_repo(call: Call) -> Any:
    told = call.json()
    if call.user is None:
        raise Refusal(401, "Invalid username or password.")
    repo_id = f"{told.get('organization') or call.user}/{told['name']}"
    if told.get("type", "model") != "model":
        raise Refusal(400, "The loopback Hub has models only")
    owner = repo_id.split("/")[0]
    check_repo(repo_id)
    if not call.hub.accounts.may_write(call.user, owner, repo_id):
        raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
    answer = {"url": f"{call.hub.endpoint}/{repo_id}", "name": repo_id}
    with call.hub.lock:
        if repo_id in call.hub.repos():
            return json_reply({"error": "You already created this model repo", **answer}, 409)
        call.hub.create(repo_id, private=told.get("visibility") == "private" or bool(told.get("private")))
    return answer


def validate_yaml(call: Call) -> Any:
    errors, warnings = said_of(call.json()["content"])
    told = {"errors": [{"message": one} for one in errors], "warnings": [{"message": one} for one in warnings]}
    return json_reply(told, 400 if errors else 200)


def auth_check(call: Call, repo: str, write: str) -> Any:
    if not call.hub.has_auth_check:
        raise Refusal(404, "Not Found")
    (call.hub.writable if write else call.hub.content_readable)(call.user, repo)
    return {}
