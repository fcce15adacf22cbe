"""Dropout: put into a finished model by rule, and with a rate that changes over training."""

from lightning_reg.dropout.functions import dropout, inject_dropout, set_dropout_
from lightning_reg.dropout.injection import DropoutInjection
from lightning_reg.dropout.scheduler import DropoutScheduler

__all__ = ["DropoutInjection", "DropoutScheduler", "dropout", "inject_dropout", "set_dropout_"]
