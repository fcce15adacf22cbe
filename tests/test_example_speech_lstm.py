"""The speech example in a short form, and what it says of its data and its dropout."""

from __future__ import annotations

import re

import matplotlib.image
import pytest
import torch
from processes import ROOT, run_script

pytest.importorskip("aeon", reason="aeon needs Python 3.11")

import speech_lstm
from lightning.pytorch import Trainer

from lightning_reg import DropoutInjection

CANDIDATES = ["plain", "locked dropout", "norm clipping", "activity penalty", "all three"]


@pytest.mark.slow
def test_example_prints_table_and_draws_figure(tmp_path):
    printed = run_script(str(ROOT / "examples" / "speech_lstm.py"), "--epochs=2", "--repeats=3", folder=tmp_path, columns=80)
    assert re.findall(rf"^ *({'|'.join(CANDIDATES)}) +\d", printed, re.MULTILINE) == CANDIDATES
    assert max(map(len, printed.splitlines())) <= 80
    assert "Warning" not in printed
    path = re.findall(r"^Figure: (.*)$", printed, re.MULTILINE)[0]
    assert matplotlib.image.imread(tmp_path / path)[..., :3].std() > 0.05


@pytest.fixture(scope="module")
def utterances():
    return speech_lstm.Utterances()


def test_splits_are_disjoint_and_differ(utterances):
    parts = [{frames.sum().item() for frames, _ in loader.dataset} for loader in utterances.split(0)]
    assert list(map(len, parts)) == [180, 45]
    assert parts[0].isdisjoint(parts[1])
    assert {speaker for _, speaker in utterances.split(0)[1].dataset} == set(range(9))
    assert parts[1] != {frames.sum().item() for frames, _ in utterances.split(1)[1].dataset}
    assert torch.cat([frames for frames, _ in utterances.split(0)[0].dataset]).mean(dim=0).abs().max() < 1e-4


def test_padding_does_not_change_logits(utterances):
    model = speech_lstm.Speakers()
    batch = next(iter(utterances.split(0)[1]))
    frames, lengths, _ = batch
    assert lengths.min() < lengths.max()
    together = model(frames, lengths)
    alone = torch.cat([model(one[None, :n], n[None]) for one, n in zip(frames, lengths, strict=True)])
    torch.testing.assert_close(together, alone)
    assert not torch.allclose(model(frames, torch.full_like(lengths, frames.shape[1])), alone)  # counts the padding


@pytest.mark.parametrize("shared_dims", [[1], None], ids=["locked", "ordinary"])
def test_locked_dropout_drops_the_same_units_in_all_frames(shared_dims, utterances):
    """Ordinary dropout does not."""
    model, dropped = speech_lstm.Speakers(), []

    def keep(module, inputs, outputs):
        packed = outputs[0] if isinstance(outputs, tuple) else outputs
        if module.training:
            padded, lengths = torch.nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)
            dropped.extend((one[:n] == 0) for one, n in zip(padded, lengths, strict=True))

    class Watch(DropoutInjection):
        def on_train_start(self, trainer, pl_module):
            super().on_train_start(trainer, pl_module)
            pl_module.lstm.register_forward_hook(keep)  # after the hook of the dropout

    trainer = Trainer(
        fast_dev_run=True,
        accelerator="cpu",
        logger=False,
        callbacks=[Watch(0.4, after="LSTM", shared_dims=shared_dims)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, *utterances.split(0))
    assert 0.3 < torch.cat(dropped).float().mean() < 0.5
    assert all((mask == mask[0]).all() for mask in dropped) == (shared_dims is not None)
