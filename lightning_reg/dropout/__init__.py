"""Dropout: added to an existing model, scheduled, or kept on for predictions."""

from lightning_reg.dropout.injection import DropoutInjection
from lightning_reg.dropout.montecarlo import MonteCarloDropout
from lightning_reg.dropout.scheduler import DropoutScheduler
from lightning_reg.dropout.sites import DROPOUT_ATTRIBUTES

__all__ = ["DROPOUT_ATTRIBUTES", "DropoutInjection", "DropoutScheduler", "MonteCarloDropout"]
