"""Who asks: a user, with what the token that came along allows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any


class User(str):
    """A user's name. `role` is that of the token: "write", "read" or "fineGrained"; with the last one, `scope` has the
    repositories and owners that it may write to."""

    role: str = "write"
    scope: Collection[str] = ()


@dataclass
class Accounts:
    """`tokens` are by token the user, `roles` and `scopes` what those allow that are no write tokens, `members` by
    organization what each user is there: "admin", "write", "contributor" (of own repositories) or "read"."""

    tokens: dict[str, str]
    roles: dict[str, str] = field(default_factory=dict)
    scopes: dict[str, Collection[str]] = field(default_factory=dict)
    members: dict[str, Mapping[str, str]] = field(default_factory=dict)

    def user(self, token: str) -> User | None:
        if token not in self.tokens:
            return None
        user = User(self.tokens[token])
        user.role, user.scope = self.roles.get(token, "write"), self.scopes.get(token, ())
        return user

    def is_member(self, user: str | None, owner: str) -> bool:
        """Whether somebody sees what an owner has."""
        return user is not None and (user == owner or user in self.members.get(owner, {}))

    def may_write(self, user: str, owner: str, repo_id: str = "") -> bool:
        """Whether the user may write to a repository of an owner, or make one (without `repo_id`), by this token."""
        role, scope = getattr(user, "role", "write"), getattr(user, "scope", ())
        if role == "read" or (role == "fineGrained" and not {owner, repo_id} & {*scope}):
            return False
        return user == owner or self.members.get(owner, {}).get(user) in ("admin", "write")

    def told(self, user: str) -> dict[str, Any]:
        """What `whoami` answers."""
        role = getattr(user, "role", "write")
        token: dict[str, Any] = {"displayName": "loopback", "role": role}
        if role == "fineGrained":
            entities = [
                {"entity": {"name": name}, "permissions": ["repo.write"]} for name in getattr(user, "scope", ())
            ]
            token["fineGrained"] = {"global": [], "scoped": entities}
        orgs = [
            {"type": "org", "name": org, "fullname": org, "roleInOrg": members[user]}
            for org, members in self.members.items()
            if user in members
        ]
        auth = {"type": "access_token", "accessToken": token}
        return {"type": "user", "id": str(user), "name": user, "fullname": user, "orgs": orgs, "auth": auth}
