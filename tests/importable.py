"""Functions and classes that tests of the command line name by their import path."""

from __future__ import annotations


def rising(progress):
    return 0.4 + 0.1 * progress


class Rising:
    """A callable that is no schedule of this package, and has no annotations.

    Args:
        start: The value at the start of training.
    """

    def __init__(self, start: float = 0.4) -> None:
        self.start = start

    def __call__(self, progress):
        return self.start + 0.1 * progress

    def __repr__(self) -> str:
        return f"Rising({self.start})"


rising_object = Rising(0.3)


def in_first_layer(name, parameter, module):
    return name.startswith("net.0")


class InLayer:
    """Selects the parameters of a layer.

    Args:
        layer: The name of the layer.
    """

    def __init__(self, layer: str = "net.0") -> None:
        self.layer = layer

    def __call__(self, name, parameter, module):
        return name.startswith(self.layer)

    def __repr__(self) -> str:
        return f"InLayer({self.layer})"


def magnitudes(name, parameter):
    return parameter.abs()


class Magnitudes:
    """Scores of weights, without annotations."""

    def __call__(self, name, parameter):
        return parameter.abs()

    def __repr__(self) -> str:
        return "Magnitudes()"


magnitudes_object = Magnitudes()
