"""The HTML report, opened in a real browser."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import pytest
from report_tools import failing, passing

from fossil_export.verifying._report import html


def render(folder: Path, text: str) -> tuple[Path, str, str]:
    """The picture of the page, its elements once loaded, and what the browser logged."""
    browser = shutil.which("chromium")
    if browser is None and os.environ.get("CI"):
        pytest.fail("chromium is not on PATH: apt-get install chromium")
    if browser is None:
        pytest.skip("chromium is not on PATH: apt-get install chromium")
    folder.mkdir()
    page, picture = folder / "report.html", folder / "page.png"
    page.write_text(text, encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={folder / 'profile'}", "--window-size=1200,1600", "--enable-logging=stderr", "--v=0"]
    command += [f"--screenshot={picture}", "--dump-dom", f"file://{page}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return picture, done.stdout, done.stderr


def pixels(picture: Path) -> list[bytes]:
    """The rows of an 8-bit RGB or RGBA picture, decoded by hand (https://www.w3.org/TR/png-3/#9Filters)."""
    import numpy as np

    content, at, packed, width, channels = picture.read_bytes(), 8, b"", 0, 0
    while at < len(content):
        size, kind = struct.unpack(">I4s", content[at : at + 8])
        body = content[at + 8 : at + 8 + size]
        if kind == b"IHDR":
            width, channels = struct.unpack(">I", body[:4])[0], {2: 3, 6: 4}[body[9]]
        packed += body if kind == b"IDAT" else b""
        at += size + 12
    raw = zlib.decompress(packed)
    rows: list[bytes] = []
    above = np.zeros((width + 1, channels), np.int32)
    for start in range(0, len(raw), width * channels + 1):
        line = np.zeros((width + 1, channels), np.int32)
        line[1:] = np.frombuffer(raw, np.uint8, width * channels, start + 1).reshape(width, channels)
        if raw[start] == 1:
            line = line.cumsum(axis=0) % 256
        elif raw[start] == 2:
            line = (line + above) % 256
        elif raw[start] in (3, 4):
            for x in range(1, width + 1):
                left, up, corner = line[x - 1], above[x], above[x - 1]
                if raw[start] == 3:
                    line[x] = (line[x] + (left + up) // 2) % 256
                    continue
                a, b, c = abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)
                line[x] = (line[x] + np.where((a <= b) & (a <= c), left, np.where(b <= c, up, corner))) % 256
        above = line
        rows.append(line[1:, :3].astype(np.uint8).tobytes())
    return rows


def colours(rows: list[bytes]) -> set[bytes]:
    return {row[at : at + 3] for row in rows for at in range(0, len(row), 3)}


def test_in_a_browser(tmp_path: Path) -> None:
    pictures = {}
    for name, made in (("passing", passing()), ("failing", failing())):
        picture, elements, logs = render(tmp_path / name, html(made))
        rows = pixels(picture)
        assert (len(rows[0]) // 3, len(rows)) == (1200, 1600)
        assert elements.count("<svg") == 2 and 'id="modules"' in elements and 'id="survival"' in elements
        assert not re.search(r":CONSOLE|Uncaught|Refused|ERR_FILE", logs)
        pictures[name] = rows
    shown = {name: colours(rows) for name, rows in pictures.items()}
    good, bad, artifact, trainer = (bytes.fromhex(code) for code in ("17713f", "b02318", "1c57a0", "bd660a"))
    amber, blue = bytes.fromhex("f4aa30"), bytes.fromhex("1f4e82")
    assert good in colours(pictures["passing"][:300]) and bad not in shown["passing"]
    assert bad in colours(pictures["failing"][:300]) and good not in shown["failing"]
    for found in shown.values():  # both lines and both ends of the colour scale
        assert {artifact, trainer, amber, blue} <= found
