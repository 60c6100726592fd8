"""The training loop: it learns, and a run that was killed ends where an unbroken one does."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.mini.loop import Plan, run_stage

PLAN = Plan(steps=40, learning_rate=0.05, warmup=5, weight_decay=0.0, average=0.9, save_seconds=0.0)


def train(work: Path, killed_at: int | None = None) -> tuple[dict[str, Tensor], list[float]]:
    """Fit y = 2x + 1. The weights at the end, and the loss of each step that ran."""
    torch.manual_seed(0)
    parts = nn.ModuleDict({"line": nn.Linear(1, 1)})
    seen = []

    def loss_at(step: int) -> dict[str, Tensor]:
        if step == killed_at:
            raise KeyboardInterrupt
        x = torch.randn(16, 1, generator=torch.Generator().manual_seed(step))
        loss = (parts["line"](x) - 2 * x - 1).square().mean()
        seen.append(float(loss.detach()))
        return {"line": loss}

    run_stage("line", work, PLAN, parts, loss_at)
    return parts.state_dict(), seen


def test_the_loss_falls_and_is_logged(tmp_path: Path):
    _, losses = train(tmp_path)
    assert losses[-1] < 0.2 * losses[0]
    assert (tmp_path / "line-curve.csv").read_text().splitlines()[0] == "step,line"


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path):
    unbroken, losses = train(tmp_path / "unbroken")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", killed_at=25)
    resumed, later = train(tmp_path / "killed")
    assert later == pytest.approx(losses[25:])
    for name, value in unbroken.items():
        assert torch.allclose(resumed[name], value)
    assert not list((tmp_path / "killed").glob("*.partial"))
