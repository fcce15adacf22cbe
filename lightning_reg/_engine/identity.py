"""Identity of an object, without keeping the object alive."""

from __future__ import annotations

from weakref import ref


class WeakIdentity:
    """Remembers an object. Copies and pickles remember nothing.

    Args:
        remembered: The object; ``None`` for nothing.

    Example:
        >>> class Model: ...
        >>> model = Model()
        >>> identity = WeakIdentity(model)
        >>> identity.is_of(model), identity.is_of(Model())
        (True, False)
    """

    def __init__(self, remembered: object = None) -> None:
        self._ref = None if remembered is None else ref(remembered)

    def is_of(self, candidate: object) -> bool:
        """Return whether this is the remembered object itself."""
        return self._ref is not None and self._ref() is candidate

    def __reduce__(self) -> tuple[type[WeakIdentity], tuple[()]]:
        return WeakIdentity, ()
