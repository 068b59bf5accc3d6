"""What is printed where: colours, bars, wide characters, --quiet, --verbose, the help, exit codes, completion."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import click
import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner, Result
from conftest import edit_json
from refusal_tools import CONFIG, refused, run

import fossil_export
from fossil_export import _terminal, merge
from fossil_export._console import print_pairs, print_table, print_warnings, progress
from fossil_export._progress import begin, note, showing
from fossil_export.cli import main
from fossil_export.commands._command import EXIT_CODES, Command, Option

PLAIN = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE")}
SHOW = """
from fossil_export._console import *
from fossil_export._progress import begin, note, showing
with showing(progress()):
    begin("a step"); note("a line above")
    begin("merging", 100, "B")(50)
print_warnings(["a warning"]); print_table(["head"], [["cell"]])
"""


def on_a_terminal(script: str, **environment: str) -> str:
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, stdout=there, stderr=there, env=PLAIN | {"TERM": "xterm"} | environment)
    os.close(there)
    shown = b""
    while True:
        try:
            part = os.read(here, 1 << 16)
        except OSError:
            break
        if not part:
            break
        shown += part
    os.close(here)
    assert process.wait() == 0, shown
    return shown.decode()


def test_no_color_and_dumb_terminals_get_no_escape_sequence() -> None:
    coloured = on_a_terminal(SHOW)
    assert "\x1b[33m" in coloured and "merging" in coloured
    plain = on_a_terminal(SHOW, NO_COLOR="1")
    assert "\x1b" not in plain and "merging" in plain and "a step" in plain  # bars are no colours
    dumb = on_a_terminal(SHOW, TERM="dumb")
    assert "\x1b" not in dumb and "merging" not in dumb and "a step" not in dumb
    for shown in (coloured, plain, dumb):
        assert "a line above" in shown and "a warning" in shown and "cell" in shown
    assert "\x1b[33m" in on_a_terminal(SHOW, NO_COLOR="")  # an empty one is none


def test_force_color_reaches_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def coloured(**environment: str) -> bool:
        with monkeypatch.context() as patch:
            for name in ("NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE", "TERM"):
                patch.delenv(name, raising=False)
            for name, value in environment.items():
                patch.setenv(name, value)
            print_warnings(["a warning"])
        return "\x1b[33m" in capsys.readouterr().err

    assert not coloured() and not coloured(FORCE_COLOR="0") and not coloured(FORCE_COLOR="")
    assert coloured(FORCE_COLOR="1") and coloured(CLICOLOR_FORCE="1")
    assert not coloured(FORCE_COLOR="1", NO_COLOR="1")


def test_wide_and_combining_characters_align(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["name", "size"], [["模型", "1"], ["e\u0301t\u0301e", "20"], ["four", "300"]])
    assert capsys.readouterr().out.splitlines() == ["name  size", "模型     1", "e\u0301t\u0301e     20", "four   300"]
    print_pairs([("模", "a"), ("two", "b")])
    assert capsys.readouterr().out == "模   a\ntwo  b\n"


@pytest.mark.parametrize("place", ["before", "after"])
def test_quiet_leaves_warnings_errors_and_json(place: str, adapter: Path, tmp_path: Path) -> None:
    def quietly(command: str, *more: str | Path) -> Result:
        return run(*(["-q", command] if place == "before" else [command, "--quiet"]), *more)

    done = quietly("merge", adapter, "-o", tmp_path / "merged")
    assert (done.exit_code, done.output) == (0, "")
    for command in (("inspect", adapter), ("verify", tmp_path / "merged", "--level", "weights"),
                    ("convert", adapter, "--to", "lora", "-o", tmp_path / "lora"),
                    ("merge", adapter, "--dry-run")):  # fmt: skip
        done = quietly(*command)
        assert (done.exit_code, done.output) == (0, ""), command
    assert json.loads(quietly("inspect", adapter, "--json").stdout)["rank"] == 8
    refused(quietly("inspect", tmp_path / "none"), "no such file")
    refused(quietly("inspect", adapter, "--base", tmp_path / "none"), "no such file")
    assert run("inspect", adapter).stdout  # and the next command of this process is not quiet
    done = run("-v", "inspect", "-q", adapter)
    assert done.exit_code == 2 and "--quiet and --verbose exclude each other" in done.stderr


def test_quiet_takes_no_bar_and_no_line_of_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert _terminal.live()
    monkeypatch.setattr(_terminal, "quiet", True)
    with showing(progress()):
        begin("a"), begin("x", 1, "B")(1), note("c")
    assert not _terminal.live() and capsys.readouterr().err == ""


@pytest.mark.parametrize("place", ["before", "after"])
def test_quiet_draws_no_bar_on_a_terminal(place: str, adapter: Path) -> None:
    given = ["-q", "inspect", str(adapter)] if place == "before" else ["inspect", str(adapter), "-q"]
    assert on_a_terminal(f"import sys\nfrom fossil_export._start import main\nsys.argv[1:] = {given!r}\nmain()") == ""


def test_verbose_says_what_is_done_and_costs_nothing_otherwise(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logging.getLogger("fossil_export").disabled = True  # as libraries do that configure logging
    monkeypatch.setattr(logging.root.manager, "disable", 0)  # which a test before may have changed
    done = run("merge", "--verbose", adapter, "-o", tmp_path / "merged", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)
    for said in (
        f"adapter {adapter}: {adapter}", f"base model {base}: {base}",
        f"fossil-export {fossil_export.__version__}, Python",
        "numpy ", "those of LlamaForCausalLM in transformers", "threads", "wrote model-", "computes with",
    ):  # fmt: skip
        assert said in done.stderr, said
    assert all(re.match(r"\[ *\d+\.\d\d s\] ", line) for line in done.stderr.splitlines())
    assert run("inspect", adapter).stderr == ""
    said = run("verify", tmp_path / "merged", "--level", "weights", "-v").stderr
    assert "artifact " in said and "compared the weights" in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_lines_that_cannot_be_written_stop_no_work(adapter: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fossil_export", "merge", "-v", str(adapter), "-o", str(tmp_path / "merged")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=full)
    assert done.returncode == 0 and b"merged" in done.stdout and (tmp_path / "merged" / "config.json").exists()


def test_python_users_hear_the_same_by_logging(adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fossil_export"):
        merge(adapter, tmp_path / "merged")
    assert any(record.getMessage().startswith("wrote model") for record in caplog.records)
    caplog.clear()
    merge(adapter, tmp_path / "again")
    assert not caplog.records


def commands() -> list[tuple[str, click.Command]]:
    return [(name, command) for name, command in main.commands.items() if not command.hidden]


def test_help_fits_into_80_columns_and_ends_with_lines_to_type() -> None:
    for name, command in commands():
        assert isinstance(command, Command) and 2 <= len(command.examples) <= 4
        text = CliRunner().invoke(main, [name, "--help"], terminal_width=80).output
        assert max(map(len, text.splitlines())) <= 80, name
        examples = text.partition("\nExamples:\n")[2].splitlines()
        assert [line.strip() for line in examples] == list(command.examples)
        options = [one for one in command.params if isinstance(one, click.Option)]
        assert all(isinstance(one, Option) and one.help for one in options)
        assert text.count("\nMessages:\n") == 1
        for line in command.examples:  # they are understood
            program, own, *arguments = line.split()
            assert (program, own) == ("fossil-export", name)
            command.make_context(name, arguments)
    merging = CliRunner().invoke(main, ["merge", "--help"], terminal_width=80).output
    heads = re.findall(r"^(\w[\w ]+):$", merging, re.MULTILINE)
    assert heads == ["Result", "Quantized bases", "Parts and clusters", "Publishing", "Messages", "Examples"]


def test_the_commands_stand_in_the_order_of_their_use() -> None:
    assert [name for name, _ in commands()] == ["inspect", "merge", "verify", "onnx", "convert", "push"]
    alone = CliRunner().invoke(main, [])
    text = CliRunner().invoke(main, ["--help"]).output
    assert alone.output.strip() == text.strip() and "\\n" not in alone.output
    assert text.index("  inspect ") < text.index("  merge ") < text.index("  push ")
    assert CliRunner().invoke(main, ["help"]).output == text
    assert CliRunner().invoke(main, ["help", "merge"]).output == CliRunner().invoke(main, ["merge", "--help"]).output
    for wrong in (["mrege"], ["help", "mrege"]):
        done = CliRunner().invoke(main, wrong)
        assert done.exit_code == 2 and "No such command 'mrege'. Did you mean 'merge'?" in done.stderr


def test_exit_codes_are_those_of_the_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = CliRunner().invoke(main, ["--help"], terminal_width=80).output
    told = dict(re.findall(r"^  (\d+) +(\S.*)$", text.partition("Exit codes:")[2], re.MULTILINE))
    assert told == dict(EXIT_CODES)
    for name, command in commands():
        arguments = ["none" for one in command.params if isinstance(one, click.Argument)]
        required = {"convert": ["--to", "lora", "-o", "x"], "merge": ["--dry-run"], "onnx": ["--dry-run"]}.get(name, [])
        assert run(name, "--help").exit_code == 0
        refused(run(name, *arguments, *required), "none")
        for wrong in ([], [*arguments, "--nonsense"], [*arguments, "more", "and more"]):
            done = run(name, *wrong)
            assert done.exit_code == 2 and done.stderr.startswith("error: "), (name, done.stderr)
            assert f"Try 'main {name} --help' for help." in done.stderr


def completed(*words: str) -> list[str]:
    shell = BashComplete(main, {}, "fossil-export", "_FOSSIL_EXPORT_COMPLETE")
    return [f"{one.type},{one.value}" for one in shell.get_completions(list(words[:-1]), words[-1])]


def test_shells_complete_commands_options_choices_and_paths() -> None:
    assert completed("") == [f"plain,{name}" for name, _ in commands()]
    for words, wanted in (
        (("merge", "my-"), ["file,my-"]),
        (("merge", "a", "--output", ""), ["dir,"]),
        (("merge", "a", "--dtype", "b"), ["plain,bfloat16"]),
        (("merge", "a", "--device", "cu"), ["plain,cuda", "plain,cuda:0", "plain,cuda:1"]),
        (("convert", "a", "--to", "gg"), ["plain,gguf-lora"]),
        (("merge", "a", "--max-sh"), ["plain,--max-shard-size"]),
    ):
        assert completed(*words) == wanted, words


def test_a_shell_asks_the_command_itself() -> None:
    script = "from fossil_export._start import main; main()"
    environment = PLAIN | {"_FOSSIL_EXPORT_COMPLETE": "bash_complete", "COMP_CWORD": "1"}
    environment["COMP_WORDS"] = "fossil-export me"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "plain,merge\n", "")


def test_ids_of_the_hub_are_taken_as_they_are_typed(adapter: Path) -> None:
    edit_json(adapter / CONFIG, base_model_name_or_path="org/model")
    context = main.commands["merge"].make_context(
        "merge", ["user/my-adapter@v1", "--base", "hf://a/b", "-o", "s3://b/c"]
    )
    assert [context.params[name] for name in ("adapter", "base", "output")] == [
        "user/my-adapter@v1",
        "hf://a/b",
        "s3://b/c",
    ]
