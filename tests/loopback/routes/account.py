"""Who asks, and what they may have or make."""

from __future__ import annotations

from typing import Any

import yaml

from loopback.call import Call, json_reply
from loopback.git import Refusal
from loopback.routes.card import front_matter


def whoami(call: Call) -> Any:
    if call.user is None:
        raise Refusal(401, "Invalid username or password.")
    auth = {"type": "access_token", "accessToken": {"displayName": "loopback", "role": "write"}}
    return {"type": "user", "id": call.user, "name": call.user, "fullname": call.user, "orgs": [], "auth": auth}


def harnesses(call: Call) -> Any:
    return {"standardEnvVars": [], "harnesses": {}}


def create_repo(call: Call) -> Any:
    told = call.json()
    if call.user is None:
        raise Refusal(401, "Invalid username or password.")
    repo_id = f"{told.get('organization') or call.user}/{told['name']}"
    if told.get("type", "model") != "model":
        raise Refusal(400, "The loopback Hub has models only")
    if repo_id.split("/")[0] != call.user:
        owner = repo_id.split("/")[0]
        raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
    answer = {"url": f"{call.hub.endpoint}/{repo_id}", "name": repo_id}
    with call.hub.lock:
        if repo_id in call.hub.repos():
            return json_reply({"error": "You already created this model repo", **answer}, 409)
        call.hub.create(repo_id, private=told.get("visibility") == "private" or bool(told.get("private")))
    return answer


def validate_yaml(call: Call) -> Any:
    try:
        card = front_matter(call.json()["content"])
    except (yaml.YAMLError, ValueError) as error:
        return json_reply({"errors": [{"message": str(error)}], "warnings": []}, 400)
    warned = [] if card else [{"message": "empty or missing yaml metadata in repo card"}]
    return {"errors": [], "warnings": warned}


def auth_check(call: Call, repo: str, write: str) -> Any:
    (call.hub.writable if write else call.hub.content_readable)(call.user, repo)
    return {}
