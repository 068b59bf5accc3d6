"""What of an artifact goes to the Hub, its model card, and the merge that streams there."""

from fossil_export.publishing._certify import publish_certificate
from fossil_export.publishing._moves import StreamPlan
from fossil_export.publishing._push import push, run_push
from fossil_export.publishing._push_plan import PushPlan, plan_push
from fossil_export.publishing._result import PushResult
from fossil_export.publishing._stream import StreamResult, merge_to_hub, plan_stream, run_stream

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
    "run_push",
    "run_stream",
]
