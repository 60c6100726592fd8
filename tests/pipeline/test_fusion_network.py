"""The fusion network's choice: what words and a picture mean together, or the words alone in one of their ways."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.fusing.fusion_network import FusionNetwork
from pipeline.mini.choice_stage import choosing
from pipeline.mini.fusion_stage import EXIT_HIDDEN, configured, reaching_further
from pipeline.mini.parts import read_part, ship

WAYS, PLACES, CHANNELS = 4, 16, 3


def network(chooses: bool = True, exit_hidden: int = 0, styles: int = 0) -> FusionNetwork:
    torch.manual_seed(0)
    return FusionNetwork(
        text_width=8, image_width=6, width=16, hidden=16, grid=4, channels=CHANNELS, ways=WAYS, chooses=chooses,
        exit_hidden=exit_hidden, styles=styles,
    ).eval()  # fmt: skip


def that_prefers(place: int) -> FusionNetwork:
    made = network()
    assert made.choice is not None
    with torch.no_grad():
        made.choice.score.bias[0] = -9.0
        made.choice.score.bias[place] = 9.0
    return made


def that_differs() -> FusionNetwork:
    """Its choice is another one for each pair."""
    made = network()
    assert made.choice is not None
    torch.nn.init.normal_(made.choice.score.weight, std=50)
    return made


def offered(by: FusionNetwork, words: Tensor, picture: Tensor) -> Tensor:
    """(B, 1 + WAYS, PLACES, CHANNELS): what both mean together, and the words in each way."""
    plain = FusionNetwork(**{**configured(by), "chooses": False})
    plain.load_state_dict(by.state_dict(), strict=False)
    return torch.cat([plain(words, picture)[:, None], plain(words, None).unflatten(1, (WAYS, PLACES))], dim=1)


@torch.no_grad()
def test_both_together_are_drawn_or_the_words_in_one_way():
    words, picture = torch.randn(5, 8), torch.randn(5, 6)
    for place in range(1 + WAYS):
        made = that_prefers(place)
        assert made(words, picture).shape == (5, PLACES, CHANNELS)
        torch.testing.assert_close(made(words, picture), offered(made, words, picture)[:, place])


@torch.no_grad()
def test_it_is_chosen_for_each_of_a_batch():
    words, picture = torch.randn(20, 8), torch.randn(20, 6)
    made = that_differs()
    assert made.choice is not None
    scores = made.choice(made.text_norm(words), made.image_norm(picture))
    assert len(set(scores.argmax(dim=1).tolist())) > 1, "each by its own score"
    pictures, drawn = offered(made, words, picture), made(words, picture)
    for entry, place in enumerate(scores.argmax(dim=1).tolist()):
        torch.testing.assert_close(drawn[entry], pictures[entry, place])
        alone = made(words[entry : entry + 1], picture[entry : entry + 1])[0]
        torch.testing.assert_close(alone, pictures[entry, place])


@torch.no_grad()
def test_what_is_chosen_is_the_likeliest():
    words, picture = torch.randn(20, 8), torch.randn(20, 6)
    made = that_differs()
    assert made.choice is not None
    torch.nn.init.normal_(made.choice.score.weight, std=1)
    scores = made.choice(made.text_norm(words), made.image_norm(picture))
    together, shares = scores[:, :1].sigmoid(), scores[:, 1:].exp()
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(20))
    likely = torch.cat([together, (1 - together) * shares], dim=1)
    assert torch.equal(likely.argmax(dim=1), scores.argmax(dim=1))


@torch.no_grad()
def test_words_alone_and_a_picture_alone_leave_nothing_to_choose():
    words, picture = torch.randn(2, 8), torch.randn(2, 6)
    one, other = network(), that_prefers(3)
    for given in ((words, None), (None, picture), (None, None)):
        assert torch.equal(one(*given), other(*given))


@torch.no_grad()
def test_untaught_it_changes_nothing():
    plain = network(chooses=False)
    words, picture = torch.randn(3, 8), torch.randn(3, 6)
    assert torch.equal(choosing(plain)(words, picture), plain(words, picture))
    taught = that_prefers(2)
    torch.testing.assert_close(choosing(taught)(words, picture), offered(taught, words, picture)[:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_saved_one_chooses_as_before(tmp_path: Path, dtype: torch.dtype):
    words, picture = torch.randn(3, 8), torch.randn(3, 6)
    made = choosing(network(chooses=False))
    torch.nn.Module.to(made, dtype)
    made.save_pretrained(tmp_path)
    read = FusionNetwork.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert isinstance(read, FusionNetwork) and read.choice is not None
    with torch.no_grad():
        torch.testing.assert_close(read(words, picture), made.float()(words, picture))


@torch.no_grad()
def test_a_gated_exit_reaches_more_directions_than_the_network_is_wide():
    def directions(of: FusionNetwork) -> int:
        tokens = of(torch.randn(200, 8), torch.randn(200, 6)).flatten(1)
        return int(torch.linalg.matrix_rank(tokens - tokens.mean(dim=0), rtol=1e-5))

    plain = FusionNetwork(text_width=8, image_width=6, width=16, hidden=16, grid=4, channels=CHANNELS)
    further = FusionNetwork(text_width=8, image_width=6, width=16, hidden=16, grid=4, channels=CHANNELS, exit_hidden=24)
    assert directions(plain) <= 16 < 36 <= directions(further)


@torch.no_grad()
@pytest.mark.parametrize("had", [0, 24])
def test_a_network_that_learns_to_reach_further_begins_where_it_was(had: int):
    before, words, picture = network(exit_hidden=had), torch.randn(3, 8), torch.randn(3, 6)
    further = reaching_further(before)
    assert further.config["exit_hidden"] == EXIT_HIDDEN and reaching_further(further) is further
    torch.testing.assert_close(further(words, picture), before(words, picture))


@torch.no_grad()
def test_a_picture_beside_words_stands_for_its_style_alone_where_that_is_known():
    made, words, pictures = network(chooses=False, styles=WAYS + 2), torch.randn(3, 8), torch.randn(3, 6)
    assert made.reader is not None and made.null_image.shape == (WAYS + 2, 6)
    assert made(words, None).shape == (3, WAYS * PLACES, CHANNELS), "words alone are drawn in the ways"
    for style in range(WAYS + 3):
        made.reader.score.bias.fill_(0)[style] = 99.0
        said = made(words, pictures)
        torch.testing.assert_close(made(None, pictures), fused(made, None, made.image_norm(pictures)))
        if style < WAYS + 2:
            known = made.null_image[style].expand(3, -1)
            torch.testing.assert_close(said, fused(made, words, known))
            torch.testing.assert_close(made(words, pictures.flip(0)), said)
        else:
            torch.testing.assert_close(said, fused(made, words, made.image_norm(pictures)))
    torch.testing.assert_close(made(words, None)[:, :PLACES], fused(made, words, made.null_image[:1].expand(3, -1)))


@torch.no_grad()
def test_each_of_a_batch_is_read_and_chosen_for_by_itself():
    made, words, pictures = network(styles=WAYS + 2), torch.randn(40, 8), torch.randn(40, 6)
    assert made.reader is not None and made.choice is not None
    for layer in (made.reader.score, made.choice.score):
        torch.nn.init.normal_(layer.weight, std=50)
    assert len(set(made.reader(made.image_norm(pictures)).argmax(dim=1).tolist())) > 2
    together = made(words, pictures)
    for place in range(0, 40, 7):
        alone = made(words[place : place + 1], pictures[place : place + 1])
        torch.testing.assert_close(together[place], alone[0], rtol=1e-4, atol=1e-4)


def fused(by: FusionNetwork, words: Tensor | None, image: Tensor) -> Tensor:
    left = by.null_text.expand(len(image), -1) if words is None else by.text_norm(words)
    return by.fuse_normalised(torch.cat([left, image], dim=1))


@torch.no_grad()
def test_layers_ship_in_eight_bits_and_the_rest_in_sixteen(tmp_path: Path):
    made, words, picture = reaching_further(network(styles=WAYS)).eval(), torch.randn(64, 8), torch.randn(64, 6)
    assert made.exit_block is not None
    torch.nn.init.normal_(made.exit_block.narrow.weight, std=0.02)
    before = offered(made, words, picture)
    ship(made, tmp_path / "fusion")
    with safe_open(tmp_path / "fusion/diffusion_pytorch_model.safetensors", "pt") as file:
        stored = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    small = {name for name, kind in stored.items() if kind == "I8"}
    assert {"entry.weight", "blocks.0.widen.weight", "exit.weight", "exit_block.narrow.weight"} <= small
    assert all(stored[name] == "F16" for name in stored.keys() - small)
    assert not {name for name in small if not name.endswith(".weight") or "norm" in name}
    assert not {name for name in small if name.startswith(("choice.", "reader."))}
    read = read_part(tmp_path / "fusion", FusionNetwork).eval()
    assert {weight.dtype for weight in read.parameters()} == {torch.float32}
    assert float((offered(read, words, picture) - before).square().mean() / before.var()) < 5e-4
