"""Code of a user's own, imported before a command looks at anything else."""

import sys
import traceback
from collections.abc import Iterable
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from .errors import StaticKeyError

_LOADED: list[str] = []


def load_plugins(sources: Iterable[str]) -> None:
    """Import files or modules, so that they can register mixers, models or hosts; each once.

    Args:
        sources: Paths of ``.py`` files, or names of modules.

    Raises:
        StaticKeyError: There is no such file or module, or it fails; the message names the line.
    """
    for source in sources:
        path = Path(source)
        is_file = path.suffix == ".py" or path.name != source
        identity = str(path.resolve()) if is_file else source
        if identity in _LOADED:
            continue
        if is_file and not (path.suffix == ".py" and path.is_file()):
            raise StaticKeyError(f"plugin {source!r} is no .py file; give one, or the name of a module")
        try:
            if is_file:
                _import_file(identity, f"statickey_plugin_{len(_LOADED)}")
            else:
                import_module(source)
        except (Exception, SystemExit) as error:
            if isinstance(error, ModuleNotFoundError) and error.name == source:
                raise StaticKeyError(
                    f"plugin {source!r} is no module that Python finds; give the path of a .py file"
                ) from error
            raise StaticKeyError(f"plugin {source}{_place(error, identity)}: {_reason(error)}") from error
        _LOADED.append(identity)


def loaded_plugins() -> tuple[str, ...]:
    """What was loaded, in order: absolute paths of files, and names of modules."""
    return tuple(_LOADED)


def _import_file(path: str, name: str) -> None:
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _place(error: BaseException, path: str) -> str:
    """The line of the plugin where it failed, else of what it called."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return _line(error.filename, error.lineno, path)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == path] or frames
    return _line(own[-1].filename, own[-1].lineno, path)


def _line(filename: str, number: int | None, path: str) -> str:
    return f", line {number}" if filename == path else f", {filename}, line {number}"


def _reason(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
