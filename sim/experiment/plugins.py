"""Plug-ins: modules of users that register things which an experiment can name, with their settings.

Reading an experiment imports its plug-ins, so every process that reads one knows them: coordinator, hosts, workers,
commands. A file is imported once a process. Installed packages name theirs as entry points of the group
`untether.plugins`; those are known everywhere.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from untether.sim.core.errors import UserError, unknown
from untether.sim.core.registry import Registry, added, undone
from untether.sim.experiment.section import Section

GROUP = "untether.plugins"
T = TypeVar("T")

_LOADED: dict[str, str] = {}
"""The module of each plug-in that was imported."""

_LOCK = threading.RLock()


def register(kind: str, name: str, thing: Any = None, *, settings: type[Section] | None = None, **facts: Any) -> Any:
    """Registers `thing` as a `kind` of that name; without a thing, returns a decorator that does so.

    Args:
        kind: Such as `filter`.
        name: The name that experiments use.
        thing: What is registered.
        settings: A section (`untether.plugins.Section`): an experiment gives its fields as `[settings.NAME]`, and the
            thing gets it as the keyword `settings` whenever it is called.
        facts: Facts that some kinds accept.

    Raises:
        UserError: The kind is unknown.
        ValueError: The name is taken.
    """
    registry = Registry.of(kind)
    if settings is not None and not (isinstance(settings, type) and issubclass(settings, Section)):
        raise ValueError(f"{kind} `{name}`: settings must be a class derived from untether.plugins.Section")

    def keep(given: T) -> T:
        registry.register(name, given, settings, **facts)
        return given

    return keep if thing is None else keep(thing)


def load_plugins(plugins: Iterable[str], where: str = "") -> tuple[str, ...]:
    """Imports plug-ins that this process has not imported yet, including installed ones.

    Args:
        plugins: Files or modules; a relative path is relative to the working directory.
        where: What the message of an error begins with.

    Returns:
        Their names, paths made absolute.

    Raises:
        UserError: One does not exist, cannot be imported or registers nothing; what it had registered is removed.
    """
    with _LOCK:
        try:
            for point in importlib.metadata.entry_points(group=GROUP) if GROUP not in _LOADED else ():
                _load(point.module)
            _LOADED[GROUP] = ""
            return tuple(_load(name) for name in plugins)
        except UserError as error:
            raise UserError(f"{where}: {error}" if where else str(error)) from error


def located(data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Returns TOML data of an experiment with the paths of its plug-ins relative to the folder of its file."""
    names = data.get("plugins")
    if not isinstance(names, list):
        return dict(data)
    found = [str(folder / Path(n).expanduser()) if isinstance(n, str) and n.endswith(".py") else n for n in names]
    return {**data, "plugins": found}


def resolved(named: Iterable[str], given: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Checks the tables of `[settings]` and fills in the defaults.

    Args:
        named: The things that the experiment names.
        given: The tables by name.

    Returns:
        The complete tables of all things that are named.

    Raises:
        UserError: A table belongs to no thing, or its section refuses a field or value.
    """
    sections, found = Registry.sections(), {}
    for name in dict.fromkeys([*given, *named]):
        if name not in sections:
            if name in given:
                fix = "" if sections else "; name what takes them in `plugins`"
                raise UserError(f"settings.{name}: {unknown('settings', name, sections or ['none'])}{fix}")
            continue
        try:
            section = sections[name].model_validate(given.get(name, {}))
        except ValidationError as error:
            raise UserError("\n  ".join(_refused(name, sections[name], error))) from None
        found[name] = section.model_dump(mode="json", exclude_none=True)
    return found


def fingerprints(plugins: Iterable[str]) -> dict[str, str]:
    """Returns the SHA-256 of the file of each plug-in, including installed ones, as this process imported it."""
    load_plugins(plugins)
    files = {name: getattr(sys.modules.get(module), "__file__", None) for name, module in _LOADED.items() if module}
    installed = {point.module for point in importlib.metadata.entry_points(group=GROUP)}
    names = {*plugins, *installed}
    return {n: hashlib.sha256(Path(f).read_bytes()).hexdigest() for n, f in sorted(files.items()) if f and n in names}


def apart() -> AbstractContextManager[None]:
    """Removes what is registered within the context, as if it had never been imported: for tests of plug-ins."""
    return _Apart()


class _Apart(AbstractContextManager[None]):
    def __enter__(self) -> None:
        self._undone, self._loaded = undone(always=True), dict(_LOADED)
        self._undone.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._undone.__exit__(None, None, None)
        for name in _LOADED.keys() - self._loaded.keys():
            sys.modules.pop(_LOADED.pop(name), None)


def _load(name: str) -> str:
    is_file = name.endswith(".py")
    if is_file:
        path = Path(name).expanduser().resolve()
        if not path.is_file():
            raise UserError(f"`{name}`: no such file. Give its path from where the experiment's file is, or a module")
        name = str(path)
    if name in _LOADED:
        return name
    module = f"untether_plugin_{hashlib.sha256(name.encode()).hexdigest()[:12]}" if is_file else name
    before, there = added(), module in sys.modules
    with undone():
        _imported(name, (lambda: _execute(module, name)) if is_file else (lambda: importlib.import_module(name)))
        if added() == before and not there:
            sys.modules.pop(module, None)
            raise UserError(f"`{name}` registers nothing. It must call untether.plugins.register")
    _LOADED[name] = module
    return name


def _imported(name: str, work: Callable[[], Any]) -> None:
    try:
        work()
    except ModuleNotFoundError as error:
        if error.name and name.startswith(error.name):
            raise UserError(f"`{name}`: no such module. Install it, or give the path of a .py file") from error
        raise UserError(f"`{name}` cannot be imported: {error}{_place(name, error)}. Install it") from error
    except (Exception, SystemExit) as error:
        what = str(error) if isinstance(error, (UserError, ValueError)) else f"{type(error).__name__}: {error}"
        raise UserError(f"`{name}` cannot be imported: {what}{_place(name, error)}") from error


def _execute(module: str, path: str) -> None:
    spec = importlib.util.spec_from_file_location(module, path)
    assert spec is not None and spec.loader is not None
    made = sys.modules[module] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(made)
    except BaseException:
        del sys.modules[module]
        raise


def _place(name: str, error: BaseException) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name]
    return f" (line {lines[-1]})" if lines else ""


def _refused(name: str, section: type[Section], error: ValidationError) -> list[str]:
    lines = []
    for item in error.errors():
        path = ".".join(["settings", name, *map(str, item["loc"])])
        if item["type"] == "extra_forbidden" and len(item["loc"]) == 1:
            lines.append(f"{path}: {unknown('key', str(item['loc'][0]), section.model_fields)}")
        else:
            lines.append(f"{path}: {item['msg'].removeprefix('Value error, ')} (got {item['input']!r})")
    return lines
