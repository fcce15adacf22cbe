"""Dropout: put into a finished model by rule, driven by a schedule, and left on for predictions."""

from lightning_reg.dropout.functions import alpha_dropout, dropout
from lightning_reg.dropout.injection import DropoutInjection, InjectedDropout, inject_dropout
from lightning_reg.dropout.montecarlo import MonteCarloDropout, sample_predictions
from lightning_reg.dropout.places import DROPOUT_ATTRIBUTES, ModulePlace, find_dropout, set_dropout_
from lightning_reg.dropout.rates import Rate
from lightning_reg.dropout.scheduler import DropoutScheduler

__all__ = [
    "DROPOUT_ATTRIBUTES",
    "DropoutInjection",
    "DropoutScheduler",
    "InjectedDropout",
    "ModulePlace",
    "MonteCarloDropout",
    "Rate",
    "alpha_dropout",
    "dropout",
    "find_dropout",
    "inject_dropout",
    "sample_predictions",
    "set_dropout_",
]
