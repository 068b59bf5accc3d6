"""Types of arguments and options: how they are spelled, and what a shell completes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from fossil_export._spellings import chosen, device_named, parse_size
from fossil_export.errors import FossilExportError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


class Spelled(click.Choice):  # type: ignore[type-arg, unused-ignore]  # generic from click 8.2 on
    """A choice among words of which dtypes may be spelled in another way."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(chosen(value, [str(one) for one in self.choices]) or value, param, ctx)


class Place(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic from click 8.2 on
    """A path, an id on the Hub or an address, taken as it is typed; a shell completes `what`: "file" or "dir"."""

    name = "text"

    def __init__(self, what: str = "file") -> None:
        self.what = what

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem  # commands must start fast

        return [CompletionItem(incomplete, type=self.what)]


class Size(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic from click 8.2 on
    """Bytes with a unit. The value is what was typed, so that messages can quote it."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            parse_size(value, "it")
        except FossilExportError as problem:
            self.fail(f"{value!r} is no size: {str(problem).partition(', ')[2]}.", param, ctx)
        return str(value)


class Device(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic from click 8.2 on
    """Where to compute."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return device_named(value)
        except FossilExportError as problem:
            self.fail(f"{problem}.", param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        known: Sequence[str] = ("cpu", "cuda", "cuda:0", "cuda:1")
        return [CompletionItem(one) for one in known if one.startswith(incomplete)]


FOLDER, FILE = Place("dir"), Place("file")
SIZE, DEVICE = Size(), Device()
