"""The commands and snippets of docs/, as they are printed, each page's one after the other in a folder of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from page_tools import BLOCK, ELSEWHERE, OTHERS, ROOT, blocks, place, run
from s3_tools import S3Server

pytestmark = pytest.mark.long

PAGES = sorted(
    page.name
    for page in (ROOT / "docs").glob("*.md")
    if blocks(page) and page.name != "extending.md"  # its blocks are parts of one file: test_extending.py
)


@pytest.mark.parametrize("name", PAGES)
def test_every_block_of_a_page_runs_in_order(
    name: str, tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server
) -> None:
    page = ROOT / "docs" / name
    text = page.read_text()
    with place(tmp_path_factory.mktemp("page")) as (folder, variables):
        (folder / "shared").mkdir()
        if "base-graph" in text:
            make_graph(folder / "my-base", folder / "base-graph")
        if "s3://bucket/" in text:
            variables |= s3_server.environment
            fill_bucket(s3_server, folder)
        variables["SLURM_ARRAY_TASK_ID"] = "1"
        for block in blocks(page):
            run(block, folder, variables)


def test_the_pages_with_blocks_are_found() -> None:
    assert {"convert.md", "hub.md", "merge.md", "onnx.md", "scale.md", "serving.md", "verify.md"} <= set(PAGES)


def test_only_named_lines_are_passed_over() -> None:
    """A line is left out only for the program that it calls; here is how many there are of each."""
    lines = [
        line
        for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
        for _, code in BLOCK.findall(page.read_text())
        for line in code.splitlines()
    ]
    left_out = [line for line in lines if line.startswith(ELSEWHERE + OTHERS)]
    assert not [line for line in left_out if "fossil-export" in line and not line.startswith(("pip", "sbatch"))]
    for start in OTHERS:
        assert any(line.startswith(start) for line in left_out), f"no page has {start!r} any more"


def make_graph(base: Path, folder: Path) -> None:
    from fossil_export.onnx.builders import BUILDERS

    folder.mkdir()
    BUILDERS["genai"].build(base, folder, "fp32", "cpu")


def fill_bucket(server: S3Server, folder: Path) -> None:
    client = server.client()
    client.create_bucket(Bucket="bucket")
    for source, name in (("my-base", "base"), ("my-adapter", "my-adapter")):
        for path in (folder / source).iterdir():
            client.upload_file(str(path), "bucket", f"{name}/{path.name}")
