"""Choosing: whether a regularizer helps, how strong it should be, and which ones to use.

Requires the extra ``tuning``.
"""

try:
    import matplotlib as matplotlib
    import optuna as optuna
    import pandas as pandas
    import scipy as scipy
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'lightning_reg.tuning requires the package {error.name}; install the extra: pip install "lightning-reg[tuning]"',
        name=error.name,
    ) from error

from lightning_reg.tuning.choice import Choice, Worth, choose
from lightning_reg.tuning.comparison import Comparison, compare
from lightning_reg.tuning.path import StrengthPath, strength_path
from lightning_reg.tuning.results import Difference
from lightning_reg.tuning.techniques import Technique

__all__ = ["Choice", "Comparison", "Difference", "StrengthPath", "Technique", "Worth", "choose", "compare", "strength_path"]
