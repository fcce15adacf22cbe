"""Fits in processes that Lightning starts itself: the weights come back, and the state of callbacks does not."""

from __future__ import annotations

import pytest
from helpers import QUIET, Classifier, loader
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_reg import GradientNormClipping, WeightPruning, sparsity


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of forks in a process with threads
def test_a_checkpoint_has_the_state_that_the_main_process_does_not(tmp_path):
    """As the documentation says."""
    model, pruning = Classifier(), WeightPruning(0.5)
    saves = ModelCheckpoint(tmp_path)
    options = {**QUIET, "enable_checkpointing": True, "strategy": "ddp_fork", "devices": 2, "accelerator": "cpu"}
    trainer = Trainer(**options, max_epochs=1, callbacks=[pruning, GradientNormClipping(1.0), saves])
    trainer.fit(model, loader())
    assert sparsity(model).fraction > 0.4
    assert pruning.state_dict() == {}
    resumed = WeightPruning(0.5)
    Trainer(**{**QUIET, "max_epochs": 2}, callbacks=[resumed, GradientNormClipping(1.0)]).fit(
        model, loader(), ckpt_path=saves.best_model_path or saves.last_model_path
    )
    assert resumed.state_dict() != {}
