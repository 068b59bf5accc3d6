"""The folder that truth and trainer are loaded from. transformers reads plain safetensors; not every base is that."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from fossil_export.checkpoints._checkpoint import Checkpoint
from fossil_export.checkpoints._opening import open_checkpoint
from fossil_export.checkpoints._plain import INDEX, is_plain
from fossil_export.errors import FossilExportError
from fossil_export.merging._finish import write_model
from fossil_export.merging._onto import plan_copy
from fossil_export.writing._scratch import scratch_folder
from fossil_export.writing._sink import FolderSink


@contextmanager
def plain_base(checkpoint: Checkpoint) -> Iterator[Checkpoint]:
    """The checkpoint itself if transformers loads its folder as the floats that are seen here, else a plain copy.

    The copy holds the dequantized weights (fp8, say, does not run on a CPU), is streamed into the folder for temporary
    files, and goes when the block ends. Raises FossilExportError if that disk is too small.
    """
    if is_plain(checkpoint):
        yield checkpoint
        return
    plan = plan_copy(checkpoint)
    if plan.index is not None:
        plan = replace(plan, index=(INDEX, plan.index[1]))
    place = Path(tempfile.gettempdir())
    needed = plan.nbytes + sum(path.stat().st_size for path in plan.companions.values())
    if (free := shutil.disk_usage(place).free) < needed:
        raise FossilExportError(
            f"{checkpoint.location}: is run as plain weights, which take {needed:,} bytes, and {place} has {free:,} "
            "free; set TMPDIR to a folder on a larger disk, or leave the run out with --level weights"
        )
    with scratch_folder() as folder:
        try:
            write_model(plan, FolderSink(folder))
            plan.check()
        except OSError as problem:
            plan.check()  # an input that is gone is no fault of this disk's
            raise FossilExportError(
                f"{checkpoint.location}: could not be written as plain weights into {folder}: {problem.strerror}; set "
                "TMPDIR to a folder on another disk"
            ) from problem
        try:
            yield open_checkpoint(folder)
        except FossilExportError as problem:  # the user knows the base by its own path
            problem.args = (str(problem).replace(str(folder), str(checkpoint.location)),)
            raise
