"""Checks that a subclass calls ``super()`` in overridden hooks in which this package does something."""

import inspect

from lightning_uq.errors import InputError

_PACKAGE = __name__.partition(".")[0]


def check_hooks(kind: type) -> None:
    """Raise an :class:`InputError` if a class overrides a hook of this package without calling ``super()``.

    Lightning's own hooks are empty, so this call is easily forgotten. Here, the
    override would silently skip metrics, checks, fits or random states.
    """
    for name in dir(kind):
        is_hook = name.startswith("on_") or name in ("setup", "teardown", "state_dict", "load_state_dict")
        if is_hook and not _is_inherited(kind, name) and not reaches_package(kind, name):
            raise InputError(
                f"{kind.__name__}.{name} must call `super().{name}(...)`, because this package does part of its work in that hook."
            )


def reaches_package(kind: type, name: str) -> bool:
    """Whether a method of this package runs when ``name`` is called, because no subclass replaces it without calling ``super()``."""
    for base in kind.__mro__:
        method = vars(base).get(name)
        if method is None:
            continue
        if _is_ours(base):
            return True
        code = getattr(inspect.unwrap(method), "__code__", None)
        if code is None or (name in code.co_names and "__class__" not in code.co_freevars):
            return True  # names a base's hook, as in `EnsembleModule.setup(self, stage)`, or cannot be inspected
        if "__class__" not in code.co_freevars:  # present if `super` is used
            return False
    return False


def _is_inherited(kind: type, name: str) -> bool:
    """Whether the hook is Lightning's, because this package does nothing in it."""
    return not any(name in vars(base) for base in kind.__mro__ if _is_ours(base))


def _is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == _PACKAGE
