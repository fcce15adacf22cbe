"""Who speaks? An LSTM on real speech, with locked dropout, norm clipping, and an activity penalty.

JapaneseVowels has 640 recordings of the vowels /ae/ by nine men, as 7 to 29 frames of 12 cepstrum coefficients. An LSTM learns
from 180 of them to tell the speakers apart. The three techniques and their values come from a known recipe for language models
(S. Merity et al., "Regularizing and Optimizing LSTM Language Models", 2018); nothing was tuned here. Locked dropout drops the
same units in all frames of an utterance. It acts on the packed sequence that the LSTM returns.

This trains the model plain, with each technique, and with all three, on eight random splits. It takes about a minute and a
half on one core, prints a table, and draws a figure.

    python examples/speech_lstm.py
"""

from __future__ import annotations

import argparse
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import matplotlib.pyplot as plt
import numpy as np
import rich
import torch
from aeon.datasets import load_japanese_vowels
from lightning.pytorch import Callback, LightningModule
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader

from lightning_reg import ActivityPenalty, DropoutInjection, GradientNormClipping
from lightning_reg.tuning import compare

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from lightning_reg.tuning import Comparison

Utterance: TypeAlias = tuple[Tensor, int]
Batch: TypeAlias = tuple[Tensor, Tensor, Tensor]

TRAINING, VALIDATION = 180, 45
PLAIN, ALL = "plain", "all three"
ORANGE, BLUE, GRAY = "#D55E00", "#0072B2", "#7F7F7F"  # distinct for color-blind readers too


class Speakers(LightningModule):
    """An LSTM whose outputs are averaged over time; nothing in it knows of regularization.

    Args:
        hidden: Units of the LSTM.
        lr: The learning rate of Adam.
    """

    def __init__(self, hidden: int = 64, lr: float = 3e-3) -> None:
        super().__init__()
        self.lr = lr
        self.lstm = nn.LSTM(12, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 9)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """Return the logits of padded utterances of shape (batch, time, 12)."""
        packed, _ = self.lstm(pack_padded_sequence(frames, lengths, batch_first=True, enforce_sorted=False))
        outputs, _ = pad_packed_sequence(packed, batch_first=True)  # zero where an utterance has ended
        logits: Tensor = self.head(outputs.sum(dim=1) / lengths[:, None])
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return self._step(batch, "train")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure a batch."""
        self._step(batch, "val")

    def _step(self, batch: Batch, part: str) -> Tensor:
        frames, lengths, speakers = batch
        logits = self(frames, lengths)
        loss = cross_entropy(logits, speakers)
        right = (logits.argmax(dim=1) == speakers).float().mean()
        self.log_dict({f"{part}/loss": loss, f"{part}/accuracy": right}, on_step=False, on_epoch=True, batch_size=len(speakers))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam, without weight decay."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def collate(utterances: Sequence[Utterance]) -> Batch:
    """Pad utterances to the longest; return them with their lengths and speakers."""
    frames, speakers = zip(*utterances, strict=True)
    return pad_sequence(list(frames), batch_first=True), torch.tensor([len(one) for one in frames]), torch.tensor(speakers)


class Utterances:
    """All recordings, and their random splits."""

    def __init__(self) -> None:
        frames, speakers = load_japanese_vowels()  # the training and the test part of the archive together
        self.frames = [torch.tensor(one.T, dtype=torch.float32) for one in frames]
        self.speakers = [int(speaker) - 1 for speaker in speakers]

    def split(self, number: int) -> tuple[DataLoader[Utterance], DataLoader[Utterance]]:
        """Return new training and validation data, stratified by speaker, standardized by the training frames."""
        train, rest = train_test_split(
            range(len(self.speakers)), train_size=TRAINING, stratify=self.speakers, random_state=number
        )
        val, _ = train_test_split(
            rest, train_size=VALIDATION, stratify=[self.speakers[index] for index in rest], random_state=number
        )
        std, mean = torch.std_mean(torch.cat([self.frames[index] for index in train]), dim=0)
        training, validation = ([((self.frames[i] - mean) / std, self.speakers[i]) for i in part] for part in (train, val))
        return (
            DataLoader(training, batch_size=20, shuffle=True, collate_fn=collate),  # type: ignore[arg-type]
            DataLoader(validation, batch_size=VALIDATION, collate_fn=collate),  # type: ignore[arg-type]
        )


def candidates() -> dict[str, list[Callback]]:
    """Return the callbacks to compare: none, each technique alone, and all three.

    The recipe's activation penalty is 2 · mean(h²). An utterance has about 16 frames of 64 outputs, so λ · ½ · sum(h²) is as
    strong at λ = 4 / 1024.
    """
    techniques: dict[str, list[Callback]] = {
        "locked dropout": [DropoutInjection(0.4, after="LSTM", shared_dims=[1])],  # dimension 1 is time
        "norm clipping": [GradientNormClipping(0.25)],
        "activity penalty": [ActivityPenalty(4e-3, modules="LSTM", p=2)],
    }
    return {PLAIN: [], **techniques, ALL: list(chain(*techniques.values()))}


def draw(result: Comparison, path: Path) -> None:
    """Draw the loss of each run and the gain of each candidate, and save the figure."""
    plt.rcParams.update({"font.size": 11, "axes.titlesize": 11, "figure.titlesize": 13})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", width_ratios=(1.2, 1))
    draw_runs(result, left)
    draw_gains(result, right)
    figure.suptitle(f"Which of nine speakers? An LSTM on {TRAINING} utterances", weight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def draw_runs(result: Comparison, axis: Axes) -> None:
    """Draw the validation loss of each run; a line joins the runs on one split."""
    losses = np.array([[run.value for run in runs] for runs in result.runs.values()])
    axis.plot(losses, color=GRAY, alpha=0.4, linewidth=0.8)
    for row, (name, values) in enumerate(zip(result.runs, losses, strict=True)):
        axis.plot([row] * len(values), values, "o", color=ORANGE if name == PLAIN else BLUE, alpha=0.7)
    axis.plot(losses.mean(axis=1), "_", color="black", markersize=24, label="mean")
    axis.set_xticks(range(len(losses)), [name.replace(" ", "\n") for name in result.runs])
    axis.set(title="Each run; a line joins the runs on one split", ylabel="validation loss (lower is better)")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)


def draw_gains(result: Comparison, axis: Axes) -> None:
    """Draw the mean gain of each candidate, with the 5 % bounds on each side."""
    for row, (name, found) in enumerate(result.differences.items()):
        axis.plot([found.low, found.high], [row, row], color=BLUE if found.verdict == "better" else GRAY, linewidth=2)
        axis.plot(found.mean, row, "o", color=BLUE if found.verdict == "better" else GRAY)
        label = axis.annotate(f"{name}: {found.verdict}", (found.mean, row), (0, 9), textcoords="offset points", ha="center")
        label.set(bbox={"color": "white", "pad": 1}, zorder=1)
    axis.axvline(0, color="black", linewidth=0.8, zorder=0)
    axis.set(title="Loss below plain, with 90% interval", xlabel="gain (right of 0 is better than plain)", yticks=[])
    axis.set_ylim(len(result.differences) - 0.6, -0.7)
    axis.margins(x=0.25)
    axis.spines[["top", "right", "left"]].set_visible(False)


def main() -> None:
    """Compare, print the table, and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40, help="epochs of each run (default: 40)")
    parser.add_argument("--repeats", type=int, default=8, help="random splits, at least 3 (default: 8)")
    parser.add_argument("--output", type=Path, default=Path("runs/speech_lstm"), help="folder for the figure")
    given = parser.parse_args()
    torch.set_num_threads(1)
    result = compare(
        Speakers,
        Utterances().split,
        candidates(),
        metric="val/loss",
        repeats=given.repeats,
        trainer={"max_epochs": given.epochs, "accelerator": "cpu"},
    )
    rich.print(result.table())
    path = given.output / "speech_lstm.png"
    draw(result, path)
    print(f"Figure: {path}")


if __name__ == "__main__":
    main()
