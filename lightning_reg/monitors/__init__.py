"""Callbacks that watch a fit without changing it: whether it overfits, and what regularization does to parameters."""

from lightning_reg.monitors.overfitting import OverfittingMonitor
from lightning_reg.monitors.parameters import ParameterMonitor

__all__ = ["OverfittingMonitor", "ParameterMonitor"]
