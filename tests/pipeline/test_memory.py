"""What a fusion network remembers: whose value is added, how well it is kept, and what it costs on disk."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.files.components import check_model
from pipeline.files.safetensors_files import CheckpointError
from pipeline.fusing.fusion_network import FusionNetwork
from pipeline.fusing.memory import KEY_WIDTH, REACH, Memory
from pipeline.mini.parts import read_part, ship

SIZE, ASKED, TOKENS, CHANNELS = 20, 14, 16, 4


@pytest.fixture
def values() -> Tensor:
    """Most of each lies in few of its tokens, as it does in drawings."""
    torch.manual_seed(0)
    return torch.randn(SIZE, TOKENS, CHANNELS) * torch.rand(SIZE, TOKENS, 1) ** 4


@pytest.fixture
def known() -> tuple[Tensor, Tensor, Tensor]:
    """A query, its keys, and what is asked for each of them."""
    torch.manual_seed(1)
    query, asked = torch.randn(ASKED, KEY_WIDTH), 3 * torch.randn(SIZE, ASKED)
    return query, asked @ query, asked


def keeping(known: tuple[Tensor, Tensor, Tensor], values: Tensor) -> Memory:
    memory = Memory(SIZE, ASKED, TOKENS, CHANNELS)
    memory.keep(*known[:2], values)
    return memory


def test_values_are_kept_in_two_bits(known: tuple[Tensor, Tensor, Tensor], values: Tensor):
    kept = keeping(known, values).values(torch.arange(SIZE))
    assert kept.shape == values.shape
    assert float((kept - values).square().mean() / values.square().mean()) < 0.25
    assert len({*(kept[3, 5] / kept[3, 5].abs().max()).tolist()}) <= 4
    assert torch.equal(keeping(known, kept).values(torch.arange(SIZE)), kept), "and again as they are"
    torch.testing.assert_close(keeping(known, kept * 0).values(torch.arange(SIZE)), kept * 0, rtol=0, atol=2e-4)


@torch.no_grad()
def test_what_is_meant_is_added_and_nothing_else(known: tuple[Tensor, Tensor, Tensor], values: Tensor):
    memory, (query, _, asked) = keeping(known, values), known
    kept = memory.values(torch.arange(SIZE)).flatten(1)
    torch.testing.assert_close(memory(asked), kept)
    torch.testing.assert_close(memory(asked[:6].unflatten(0, (2, 3))), kept[:6].unflatten(0, (2, 3)))
    assert memory(asked + 100).abs().max() == 0, "far from all"
    assert memory.knows(torch.cat([asked, asked + 100])).tolist() == [True] * SIZE + [False] * SIZE
    unit = torch.randn(1, ASKED)
    unit /= (unit @ query).norm()  # which moves a query by one
    reach = [float(memory(asked[:1] + far * unit).norm() / kept[:1].norm()) for far in (0, 3, REACH, REACH + 3)]
    assert reach[:3] == pytest.approx([1, 1, 0.5], abs=0.02) and reach[3] < 1e-6
    twins = keeping((query, known[1].roll(1, 0).index_copy(0, torch.tensor([0, 1]), known[1][[0, 0]]), asked), values)
    assert float(twins(asked[:1]).norm()) == pytest.approx(float(kept[:1].norm()) / 2, rel=1e-3), "either may be meant"


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_knows_what_is_meant_in_half_precision(
    known: tuple[Tensor, Tensor, Tensor], values: Tensor, dtype: torch.dtype
):
    memory = keeping(known, values)
    before = memory(known[2])
    added = memory.to(dtype)(known[2].to(dtype))
    assert added.dtype == dtype and memory.codes.dtype == torch.uint8
    torch.testing.assert_close(added.float(), before, rtol=0.02, atol=0.02)


@torch.no_grad()
def test_a_network_remembers_and_forgets(known: tuple[Tensor, Tensor, Tensor], values: Tensor, tmp_path: Path):
    network, asked = FusionNetwork(8, 6, 16, 16, grid=4, channels=CHANNELS).eval(), known[2]
    others, before = torch.randn(5, ASKED) - 50, network.fuse_normalised(known[2])
    plain = network.fuse_normalised(others)
    network.remember(*known[:2], values)
    said = network.fuse_normalised(asked)
    assert float((said - before - values).square().mean() / values.square().mean()) < 0.25
    assert torch.equal(network.fuse_normalised(others), plain)
    ship(network, tmp_path / "fusion")
    with safe_open(tmp_path / "fusion/diffusion_pytorch_model.safetensors", "pt") as file:
        stored = {name: file.get_slice(name).get_dtype() for name in file.keys() if name.startswith("memory.")}  # noqa: SIM118
    assert stored == {
        "memory.codes": "U8", "memory.keys": "F16", "memory.query.weight": "F16", "memory.scales": "F8_E5M2"
    }  # fmt: skip
    read = read_part(tmp_path / "fusion", FusionNetwork).eval()
    assert float((read.fuse_normalised(asked) - said).square().mean() / said.var()) < 5e-4
    assert read.memory is not None and network.memory is not None
    assert torch.equal(read.memory.codes, network.memory.codes)
    read.forget()
    assert read.config["remembers"] == 0 and float((read.fuse_normalised(asked) - before).abs().max()) < 0.05


@torch.no_grad()
def test_what_is_remembered_is_drawn_as_it_is_shown():
    torch.manual_seed(0)
    network = FusionNetwork(8, 6, 16, 16, grid=4, channels=CHANNELS, ways=2, chooses=True).eval()
    assert network.choice is not None
    network.choice.score.bias.copy_(torch.tensor([-5.0, 0.0, 5.0]))  # all is to be drawn in the second way
    words, shown = 3 * torch.randn(4, 8), 3 * torch.randn(4, 6)
    left, right = network.text_norm(words), network.image_norm(shown)
    as_shown, second = (
        network.fuse_normalised(torch.cat([left, side], dim=1)) for side in (right, network.null_image[1].expand(4, -1))
    )
    torch.testing.assert_close(network(words, shown), second)
    query = torch.randn(ASKED, KEY_WIDTH)
    network.remember(query, torch.cat([left, right], dim=1)[:2] @ query, torch.zeros(2, TOKENS, CHANNELS))
    said = network(words, shown)
    torch.testing.assert_close(said[:2], as_shown[:2], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(said[2:], second[2:], rtol=1e-3, atol=1e-3)
    assert float((as_shown - second).abs().amax(dim=(1, 2)).min()) > 0.02


def test_a_folder_that_asks_for_too_many_is_refused(
    known: tuple[Tensor, Tensor, Tensor], values: Tensor, tmp_path: Path
):
    network = FusionNetwork(8, 6, 16, 16, grid=4, channels=CHANNELS)
    network.remember(*known[:2], values)
    network.save_pretrained(tmp_path)
    weights = [tmp_path / "diffusion_pytorch_model.safetensors"]
    check_model(tmp_path / "config.json", weights)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"remembers": 10**12}), "utf-8")
    with pytest.raises(CheckpointError, match="remembers to suit weights"):
        check_model(tmp_path / "config.json", weights)
