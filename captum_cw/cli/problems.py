"""Error messages in one line."""

from __future__ import annotations

from importlib.util import find_spec

#: The extra that installs a module.
EXTRAS = {
    "datasets": "evaluate",
    "lm_eval": "tasks",
    "pandas": "evaluate",
    "scipy": "analysis",
    "sklearn": "analysis",
}


def need(*modules: str) -> None:
    """Check that modules are installed, so that a long run does not fail at its end.

    Raises:
        ModuleNotFoundError: If a module is missing.

    Example:
        >>> need("json", "no_such_module")
        Traceback (most recent call last):
        ...
        ModuleNotFoundError: No module named 'no_such_module'
    """
    for module in modules:
        if find_spec(module) is None:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)


def message_of(error: BaseException) -> str:
    """Return the message of an error in one line.

    Example:
        >>> message_of(ModuleNotFoundError("No module named 'pandas'", name="pandas"))
        "pandas is not installed: pip install 'captum-cw[evaluate]'"
    """
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted."
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        return f"{error.name} is not installed: pip install 'captum-cw[{EXTRAS[error.name]}]'"
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"There is no {error.filename}."
    return " ".join(str(error).split()) or type(error).__name__
