"""Is the artifact what was trained? Weight by weight and answer by answer."""

from fossil_export.verifying.api import Verification, verify

__all__ = ["Verification", "verify"]
