"""Is the artifact what was trained? Weight by weight and answer by answer."""

from fossil_export.verifying.api import verify
from fossil_export.verifying.verdict import Verification

__all__ = ["Verification", "verify"]
