"""What of an artifact goes to the Hub, its model card, and the merge that streams there."""

from fossil_export.publishing.certify import publish_certificate
from fossil_export.publishing.moves import StreamPlan
from fossil_export.publishing.push import push
from fossil_export.publishing.push_plan import PushPlan, plan_push
from fossil_export.publishing.result import PushResult
from fossil_export.publishing.stream import StreamResult, merge_to_hub, plan_stream

__all__ = [
    "PushPlan",
    "PushResult",
    "StreamPlan",
    "StreamResult",
    "merge_to_hub",
    "plan_push",
    "plan_stream",
    "publish_certificate",
    "push",
]
