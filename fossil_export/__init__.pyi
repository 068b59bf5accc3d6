# The names that the package offers, and where they are imported from on first use; __init__.py reads them here.

from fossil_export.adapters import Adapter as Adapter
from fossil_export.adapters import load_adapter as load_adapter
from fossil_export.converting.conversion import Conversion as Conversion
from fossil_export.converting.conversion import convert as convert
from fossil_export.errors import FossilExportError as FossilExportError
from fossil_export.inspection import Inspection as Inspection
from fossil_export.inspection import inspect as inspect
from fossil_export.merging import MergePlan as MergePlan
from fossil_export.merging import MergeResult as MergeResult
from fossil_export.merging import merge as merge
from fossil_export.merging import plan_merge as plan_merge
from fossil_export.onnx.api import OnnxResult as OnnxResult
from fossil_export.onnx.api import export_onnx as export_onnx
from fossil_export.publishing import PushPlan as PushPlan
from fossil_export.publishing import PushResult as PushResult
from fossil_export.publishing import StreamPlan as StreamPlan
from fossil_export.publishing import StreamResult as StreamResult
from fossil_export.publishing import merge_to_hub as merge_to_hub
from fossil_export.publishing import plan_push as plan_push
from fossil_export.publishing import plan_stream as plan_stream
from fossil_export.publishing import publish_certificate as publish_certificate
from fossil_export.publishing import push as push
from fossil_export.verifying.verdict import Verification as Verification
from fossil_export.verifying.verification import verify as verify
from fossil_export.version import __version__ as __version__
