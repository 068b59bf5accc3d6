"""What the Hub's client raises while something is published, told apart."""

from __future__ import annotations

from fossil_export.storage.hub import _errors as errors
from fossil_export.storage.hub._errors import is_transient


def is_damaged(problem: BaseException) -> bool:
    """Whether an upload arrived as something else than was sent."""
    return any(errors.status_of(cause) == 422 for cause in errors.causes_of(problem))


def is_copy_refusal(problem: BaseException) -> bool:
    """Whether it was the copying between repositories that failed, and not for want of an answer."""
    if is_transient(problem):
        return False
    if type(problem).__name__ == "FileDuplicationError" or str(problem).startswith("Cannot duplicate"):
        return True
    response = getattr(problem, "response", None)
    return response is not None and str(response.url.path).endswith("/lfs-files/duplicate")


def why_not_copied(problem: BaseException) -> str:
    """What stands against copying."""
    if type(problem).__name__ == "FileDuplicationError":  # a line for each file
        return errors.redacted(str(problem).splitlines()[-1].rpartition(": ")[2])
    if str(problem).startswith("Cannot duplicate"):
        return "it keeps them in its older storage"
    said = str(getattr(problem, "server_message", None) or "")
    return errors.redacted(" ".join(said.split())) or f"status {errors.status_of(problem)}"
