"""Which regularizers help on few digits with many wrong labels, how strong should they be, and how sure is that?

This searches over the default techniques with Optuna, drops those that do not help, and confirms the rest on splits that the
search never saw. It takes about four minutes on one core. It prints the claimed and the confirmed gain, draws a figure, and
writes the callbacks to a file for LightningCLI. If you interrupt it, the same command resumes the search. The same command in a
second terminal shares the work.

    python examples/choose_digits.py
    python examples/digits.py fit --config runs/choose_digits/reg.yaml
"""

from __future__ import annotations

import argparse
from pathlib import Path

import rich
import torch
from digits import EPOCHS, Digits, DigitsClassifier

from lightning_reg.tuning import choose

OUTPUT = Path("runs/choose_digits")


def main() -> None:
    """Choose, print the table, draw the figure, and write the callbacks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=40, help="runs of the search (default: 40)")
    parser.add_argument("--confirm", type=int, default=20, help="splits of the confirmation (default: 20)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"epochs of each run (default: {EPOCHS})")
    given = parser.parse_args()
    torch.set_num_threads(1)
    choice = choose(
        DigitsClassifier,
        lambda split: Digits(seed=split),
        trials=given.trials,
        confirm=given.confirm,
        metric="val/accuracy",
        mode="max",
        trainer={"max_epochs": given.epochs, "accelerator": "cpu"},
        storage=f"sqlite:///{OUTPUT}/choose.db",
    )
    rich.print(choice.table())
    choice.figure().savefig(OUTPUT / "choice.png", dpi=150)
    choice.to_yaml(OUTPUT / "reg.yaml")
    print(
        f"Callbacks: {OUTPUT / 'reg.yaml'}\nFigure: {OUTPUT / 'choice.png'}\nRuns: optuna-dashboard sqlite:///{OUTPUT}/choose.db"
    )


if __name__ == "__main__":
    main()
