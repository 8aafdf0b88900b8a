"""A Lightning trainer over our loader: killed in the middle of an epoch, its checkpoint goes on with the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import folder, make  # noqa: F401  (folder is a fixture)

lightning = pytest.importorskip("lightning")

STEPS = 10  # of an epoch: 37 samples by four


class KilledError(Exception):
    pass


class Model(lightning.LightningModule):
    """Takes down which samples it sees at which of its epochs, and their crops."""

    def __init__(self, images: Path, kill_at: int, checkpoint: Path) -> None:
        super().__init__()
        self.images, self.kill_at, self.checkpoint = images, kill_at, checkpoint
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[tuple[int, list[int], float]] = []

    def train_dataloader(self) -> Any:
        return make(self.images)

    def training_step(self, batch: dict[str, Any]) -> torch.Tensor:
        self.seen.append((self.current_epoch, batch["_indices"].tolist(), float(batch["a"].double().sum())))
        return self.layer(batch["a"].mean((1, 2, 3))[:, None]).mean()

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_step == self.kill_at:
            self.trainer.save_checkpoint(self.checkpoint)
            raise KilledError

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def train(images: Path, folder: Path, *, kill_at: int = -1, resume: bool = False) -> list[Any]:  # noqa: F811
    model = Model(images, kill_at, folder / "last.ckpt")
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(model, ckpt_path=model.checkpoint if resume else None)
    except KilledError:
        assert kill_at > 0
    return model.seen


@pytest.mark.filterwarnings("ignore")  # Lightning's own
def test_a_killed_run_goes_on_with_the_same_bytes(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    whole = train(folder, tmp_path)
    assert len(whole) == 2 * STEPS and [epoch for epoch, _, _ in whole] == [0] * STEPS + [1] * STEPS
    for epoch in (0, 1):
        assert sorted(number for at, ids, _ in whole if at == epoch for number in ids) == list(range(37))
    for kill_at in (4, STEPS + 3):
        first = train(folder, tmp_path, kill_at=kill_at)
        assert len(first) == kill_at
        assert first + train(folder, tmp_path, resume=True) == whole
