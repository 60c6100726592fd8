"""The training loop and the stages: they learn, and a run that was killed ends where an unbroken one does."""

import json
import math
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, UNet2DConditionModel
from torch import Tensor, nn

from pipeline.checkpoints import Checkpoint
from pipeline.fusing.fusion_network import FusionNetwork
from pipeline.mini import MODEL_FOLDER, apart_stage, finish_losses, last_layers, retouch_stage
from pipeline.mini import train as train_module
from pipeline.mini.apart_stage import TOLD_APART, most_taken, train_apart
from pipeline.mini.autoencoder import (
    DECODER_LAYERS,
    deepened,
    encode_pictures,
    new_autoencoder,
    picture_loss,
    to_model_range,
    train_autoencoder,
)
from pipeline.mini.catalogue import STYLES, Concept, HoldOut
from pipeline.mini.choice_stage import lessons_of, train_choice
from pipeline.mini.curves import draw_curves, read_curves
from pipeline.mini.examples import READ, WAYS, Examples
from pipeline.mini.finish_losses import NEAR, ImageNetEye, LineUp, Onlookers, layers_apart, mesh_loss, over_colour
from pipeline.mini.finish_stage import train_finish
from pipeline.mini.fusion_stage import configured, new_fusion, on_grid, said_weight, train_fusion
from pipeline.mini.generator_stage import new_generator, train_generator
from pipeline.mini.last_layers import by_names, move_answers
from pipeline.mini.loop import Plan, run_stage
from pipeline.mini.pictures import PictureSet
from pipeline.mini.reader_stage import train_reader
from pipeline.mini.remembering import remember, remembered
from pipeline.mini.retouch_stage import NEARER, RETOUCHED, SIZES, Aim, Retoucher, finishes, train_retouch
from pipeline.mini.scenes.phantoms import REGIONS, SIDES, Insert, Phantom, render_phantom
from pipeline.mini.scenes.scene_set import SUN_AZIMUTH, SceneSet, phantom_of, sky_of
from pipeline.mini.scenes.skies import Sky, render_sky
from pipeline.mini.tables import Tables
from pipeline.mini.train import main
from pipeline.mini.training_set import TrainingSet
from pipeline.mini.vision import new_image_encoder, over_background, train_image_encoder
from pipeline.mini.words import Captions, build_tokenizer, lengthened
from pipeline.model_cache import ModelCache

PLAN = Plan(steps=40, batch=16, learning_rate=0.05, warmup=5, weight_decay=0.0, average=0.9, save_seconds=0.0)


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


def test_a_curve_goes_on_from_the_checkpoint(tmp_path: Path):
    """It is written more often: what a kill left beyond would come twice."""
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, killed_at=25)
    curve = tmp_path / "line-curve.csv"
    curve.write_text("step,line\n10,1.0\n30,0.5\n3")
    train(tmp_path)
    assert [row.split(",")[0] for row in curve.read_text().splitlines()] == ["step", "10", str(PLAN.steps)]


def test_fewer_steps_than_were_learned_are_refused(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, killed_at=25)
    parts = nn.ModuleDict({"line": nn.Linear(1, 1)})
    with pytest.raises(ValueError, match=r"at least the 25 steps that .* has learned, got 20"):
        run_stage("line", tmp_path, replace(PLAN, steps=20), parts, lambda step: {})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--again", "fusion"], "--again goes on from a model: expected --start, got none"),
        (["--size", "100"], "expected --size to be a multiple of 32, got 100"),
        (["--steps", "fusion=many"], "expected STAGE=STEPS with one of text"),
        (["--start", "nowhere"], "expected --start to be the folder of a model, found none in nowhere"),
        (["--start", str(MODEL_FOLDER), "--again", "text"], "expected fusion to learn again what text says anew"),
        (["--start", str(MODEL_FOLDER), "--again", "generator"], "expected finish to learn again what generator says"),
    ],
)
def test_what_the_command_cannot_do_is_said_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
):
    with pytest.raises(SystemExit):
        main([*arguments, "--work", str(tmp_path / "work")])
    assert said in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


class Begun(Exception):
    """The arguments were taken."""


def begin(work: Path, size: int) -> None:
    raise Begun


def test_a_work_folder_is_of_one_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Parts, tables and batches of another would pass for its own."""

    monkeypatch.setattr(train_module, "load_training_set", begin)
    arguments = ["--work", str(tmp_path), "--steps", "fusion=10", "--steps", "text=5"]
    for further in ([], ["--until", "text"], ["--model", str(tmp_path / "m")]):
        with pytest.raises(Begun):
            main([*arguments, *further])
    for further in (["--steps", "fusion=11"], ["--size", "64"], ["--start", str(MODEL_FOLDER)]):
        with pytest.raises(SystemExit):
            main([*arguments, *further])
        assert "was begun with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("again", "anew"), [("finish", ["apart", "retouch"]), ("retouch", ["apart"]), ("apart", []), ("choice", ["choice"])]
)
def test_stages_that_lie_in_what_others_say_follow_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: str, anew: list[str]
):
    monkeypatch.setattr(train_module, "load_training_set", begin)
    with pytest.raises(Begun):
        main(["--work", str(tmp_path), "--start", str(MODEL_FOLDER), "--again", again])
    assert json.loads((tmp_path / "run.json").read_text("utf-8"))["anew"] == anew


# --- the stages, on a handful of pictures ---

SIZE, CONCEPTS = 32, 6
HELD = 2, WAYS[1]  # the pair of concept and style that is held out


@pytest.fixture(scope="module")
def pictures() -> TrainingSet:
    """Six concepts in every style, as plain colours, beside real scenes."""
    pick = np.random.default_rng(0)
    kinds = [(concept, style) for concept in range(CONCEPTS) for style in range(len(STYLES))]
    drawn = np.repeat(pick.integers(0, 255, (len(kinds), 1, 1, 4), np.uint8), SIZE, axis=1).repeat(SIZE, axis=2)
    drawn[..., :3] = np.minimum(drawn[..., :3], drawn[..., 3:])  # premultiplied
    concepts = tuple(
        Concept(f"{number}", "", {"en": f"thing {number}", "zh": f"{number}"}, {}, 0) for number in range(6)
    )
    concept, style = (np.array(column) for column in zip(*kinds, strict=True))
    scenes = [
        SceneSet(
            np.stack([one.pixels for one in some]),
            np.array([one.captions for one in some]),
            np.array([one.facts for one in some]),
            np.array([one.layout for one in some]),
        )
        for some in ([sky_of(number, SIZE) for number in range(8)], [phantom_of(number, SIZE) for number in range(8)])
    ]
    return TrainingSet(_Few(drawn, concept, style, concepts), *scenes)


class _Few(PictureSet):
    """Too few to hold out hundreds: one pair, of a style that words alone may be drawn in."""

    def held_out(self) -> HoldOut:
        return HoldOut(frozenset(), frozenset({HELD}))


@pytest.fixture(scope="module")
def tables(pictures: TrainingSet) -> Tables:
    torch.manual_seed(0)
    vae = new_autoencoder()
    square, wide = (
        encode_pictures(vae, torch.cat([pictures.pixels[0], pictures.pixels[2]])),
        encode_pictures(vae, pictures.pixels[1]),
    )
    emoji, sky, _ = np.split(np.arange(len(square) + len(wide)), pictures.starts[1:])
    square = torch.cat([square[: len(emoji)], torch.zeros(len(sky), *square.shape[1:]), square[len(emoji) :]])
    names = np.repeat(np.arange(CONCEPTS), 2)
    count = len(square)
    return Tables(
        captions=torch.randn(len(names), 512),
        caption_concept=names,
        caption_is_name=np.tile([True, False], CONCEPTS),
        bare_names=np.arange(2 * CONCEPTS).reshape(-1, 2),
        scene_captions=torch.randn(count - len(emoji), 6, 512),
        features=torch.randn(count, 2, 256),
        square=square / square.std(),
        wide=wide / square.std(),
        wide_from=len(emoji),
        scaling_factor=1.0,
    )


def test_rows_of_all_domains_come_back_in_their_order(pictures: TrainingSet):
    rows = np.array([60, 3, 50, 0, 49])
    means = pictures.each(rows, lambda pixels: pixels.float().mean(dim=(1, 2)))
    for row, found in zip(rows, means, strict=True):
        assert torch.equal(found, pictures.pixels_of(np.array([row])).float().mean(dim=(1, 2))[0])
    assert pictures.domain_of(rows).tolist() == [2, 0, 1, 0, 1]


def test_a_batch_holds_each_domain_with_its_own_words(pictures: TrainingSet, tables: Tables):
    drawn = Examples(pictures, tables).draw(3, 100)
    assert [int((pictures.domain_of(drawn.rows) == domain).sum()) for domain in range(3)] == [78, 14, 8]
    assert bool((drawn.has_text | drawn.has_image).all())
    for place in np.flatnonzero(pictures.domain_of(drawn.rows) > 0):
        own = tables.scene_captions[drawn.rows[place] - pictures.starts[1]]
        assert (own == drawn.text[place].cpu()).all(dim=1).any(), "a scene is called by its own captions"
    for place in range(78):
        row = drawn.rows[place]
        own = tables.captions[tables.caption_concept == pictures.emoji.concept[row]]
        assert (own == drawn.text[place].cpu()).all(dim=1).any(), "a drawing is called by its concept's words"
        assert (tables.features[row] == drawn.image[place].cpu()).all(dim=1).any(), (
            "by itself, where there are no words"
        )
        assert READ[int(drawn.way[place])] == pictures.emoji.style[row], "and by its style where there are"
    assert torch.equal(drawn.has_image[:78], ~drawn.has_text[:78])
    again = Examples(pictures, tables).draw(3, 100)
    assert torch.equal(drawn.text, again.text) and np.array_equal(drawn.rows, again.rows)


def test_a_style_is_shown_by_one_picture_or_by_several(pictures: TrainingSet, tables: Tables):
    image, style = Examples(pictures, tables).shown(3, 100)
    several = 0
    for shown, number in zip(image.cpu(), style.tolist(), strict=True):
        drawings = number < len(READ)
        rows = np.flatnonzero(pictures.emoji.style == READ[number]) if drawings else np.arange(48, 64)
        views = tables.features[rows].flatten(0, 1)
        share = torch.linalg.lstsq(views.T, shown[:, None]).solution
        assert torch.allclose(views.T @ share, shown[:, None], atol=1e-3)
        assert share.min() > -1e-3 and share.sum() == pytest.approx(1, abs=1e-3)
        assert drawings or share.max() > 0.99
        several += int(share.max() < 0.99)
    assert 10 < several < 32, "a quarter of the drawings"
    assert set(style.tolist()) == {*range(len(READ)), len(READ)}


def test_what_is_held_out_is_neither_drawn_nor_stood_for_by_another_style(pictures: TrainingSet, tables: Tables):
    concept, style = HELD
    drawn = Examples(pictures, tables).draw(5, 4000, (1, 0, 0))
    of_it = pictures.emoji.concept[drawn.rows] == concept
    assert of_it.sum() > 400 and (pictures.emoji.style[drawn.rows[of_it]] != style).all()
    ways = drawn.way.cpu().numpy()[of_it & ~drawn.has_image.cpu().numpy()[:, 0]]
    assert set(ways.tolist()) == set(range(len(READ))) - {READ.index(style)}


def test_curves_of_several_runs_are_drawn_one_after_the_other(tmp_path: Path):
    for run, steps in (("one", (10, 20)), ("two", (5,))):
        (tmp_path / run).mkdir()
        rows = "".join(f"{step},{1 / step},{2 / step}\n" for step in steps)
        (tmp_path / run / "fusion-curve.csv").write_text(f"step,emoji,scenes\n{rows}")
    found = read_curves([tmp_path / "one", tmp_path / "two"])
    assert list(found) == ["fusion"] and [run["step"].tolist() for run in found["fusion"]] == [[10, 20], [5]]
    pytest.importorskip("matplotlib")
    (panel,) = draw_curves(found).axes
    of_four = draw_curves({str(number): found["fusion"] for number in range(4)}).axes
    assert [each.axison for each in of_four] == [True] * 4 + [False] * 2
    drawn = [line.get_xdata().tolist() for line in panel.lines if line.get_marker() == "."]
    assert drawn == [[10, 20], [10, 20], [25], [25]]
    with pytest.raises(ValueError, match="expected curves such as"):
        read_curves([tmp_path])


def test_the_mean_of_a_panorama_is_of_neighbours_side_by_side(pictures: TrainingSet, tables: Tables):
    means = tables.means()[tables.wide_from].T.unflatten(1, tables.square.shape[-2:])
    assert torch.allclose(means, (tables.wide[0, :, :, 0::2] + tables.wide[0, :, :, 1::2]) / 2, atol=1e-6)
    laid = on_grid(tables.means()[[tables.wide_from]], tables.wide.shape[-1])
    assert torch.equal(laid[0, :, :, 0], laid[0, :, :, 1]) and laid.shape[-1] == 2 * laid.shape[-2]


def test_a_turned_panorama_is_encoded_as_the_same_one_turned(shipped: Checkpoint, warm: ModelCache):
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 64, 128, 4), np.uint8))
    with shipped.use(warm, "vae") as vae:

        def apart(closes: bool) -> float:
            one, other = (encode_pictures(vae, pixels.roll(by, dims=2), closes) for by in (0, 8))
            return float((one.roll(1, -1) - other).abs().max() / one.std())

        assert apart(True) < 0.05 < 0.3 < apart(False)


def test_what_the_words_say_of_a_scene_lies_where_it_counts_more():
    of_sky, of_phantom = (said_weight(16)[domain].unflatten(0, (16, 16)) for domain in (1, 2))
    assert bool((said_weight(16)[0] == 1).all())
    for height in range(5, 85, 10):
        sky = render_sky(Sky(height, SUN_AZIMUTH, "clear", "summer", "sea"), 128, np.random.default_rng(height))
        row, column = divmod(int(sky[:64].min(axis=-1).argmax()), 256)
        assert of_sky[row // 8, column // 16] > 1, (height, row, column)
    for region in REGIONS:
        for side in SIDES:
            plain, drawn = (
                render_phantom(Phantom(region, inserts), 128, np.random.default_rng(5))
                for inserts in ((), (Insert(side, "large", "bright"),))
            )
            rows, columns = np.nonzero(np.abs(drawn - plain) > 0.2)
            assert len(rows) and float((of_phantom[rows // 8, columns // 8] > 1).float().mean()) > 0.95, (region, side)


def test_words_of_anything_are_asked_beside_any_style(pictures: TrainingSet, tables: Tables):
    emoji = pictures.emoji
    said, shown = np.zeros(3, int), np.zeros((CONCEPTS, len(STYLES)), int)
    met = 0
    for step in range(20):
        asked = Examples(pictures, tables).ask(step, 128)
        assert asked.text.shape == (128, 512) and asked.image.shape == (128, 256)
        of_words, of_picture = pictures.domain_of(asked.said), pictures.domain_of(asked.shown)
        said += np.bincount(of_words, minlength=3)
        met += int((of_words != of_picture).sum())
        both = (of_words == 0) & (of_picture == 0)
        np.add.at(shown, (emoji.concept[asked.said[both]], emoji.style[asked.shown[both]]), 1)
    assert said[0] > said[1] > said[2] > 0 < met < 256
    assert shown[HELD] and shown.min() > 0.3 * shown.mean(), "each style as often as any, the one held out too"


def test_a_choice_is_taught_what_was_learned_together_and_which_way_will_do(
    pictures: TrainingSet, tables: Tables, tmp_path: Path
):
    lessons = lessons_of(pictures)
    assert lessons.together.shape == (CONCEPTS + 2, len(STYLES) + 2) and lessons.worth.shape[2] == len(WAYS)
    assert not lessons.together[HELD] and bool((lessons.worth[HELD] == 0).all()), "nothing of it is known"
    expected = torch.zeros_like(lessons.together)
    expected[:CONCEPTS, : len(STYLES)] = 1
    expected[HELD] = 0
    expected[range(CONCEPTS, CONCEPTS + 2), range(len(STYLES), len(STYLES) + 2)] = 1
    assert torch.equal(lessons.together, expected)
    assert float(lessons.worth.max()) <= 1 and bool(lessons.worth.any())
    for number, way in enumerate(WAYS):
        assert not lessons.worth[:, way, number].any(), "the drawing itself is not given away"
    assert not lessons.worth[HELD[0], :, WAYS.index(HELD[1])].any()

    network = new_fusion(tables).eval()
    before = deepcopy(network)
    plan = Plan(steps=150, batch=128, learning_rate=5e-3, warmup=1, weight_decay=0.0, average=0.5)
    taught = train_choice(tmp_path, pictures, tables, network, plan)
    assert (tmp_path / "choice-curve.csv").read_text().splitlines()[0] == "step,together,lost"
    for name, weight in before.state_dict().items():
        assert name.startswith("choice.") or torch.equal(weight, taught.state_dict()[name]), name
    assert taught.choice is not None
    asked = Examples(pictures, tables).ask(1000, 512)
    emoji = (pictures.domain_of(asked.said) == 0) & (pictures.domain_of(asked.shown) == 0)
    at = pictures.emoji.concept[asked.said[emoji]], pictures.emoji.style[asked.shown[emoji]]
    with torch.no_grad():
        scores = taught.choice(taught.text_norm(asked.text), taught.image_norm(asked.image))[torch.from_numpy(emoji)]
    for sign, some in ((1, lessons.together[at] == 1), (-1, lessons.together[at] == 0)):
        assert float((sign * scores[some, 0] > 0).float().mean()) > 0.8, sign
    worth = lessons.worth[at]
    gained = worth.gather(1, scores[:, 1:].argmax(dim=1, keepdim=True)).mean()
    assert float(gained) > 1.1 * float(worth.mean())


def test_a_reader_learns_the_styles_of_pictures(pictures: TrainingSet, tables: Tables, tmp_path: Path):
    drawn, count = pictures.emoji.style, len(tables.features)
    kinds = np.concatenate([drawn, np.full(count - len(drawn), len(STYLES))])
    look = 2 * torch.randn(len(STYLES) + 1, 1, 256, generator=torch.Generator().manual_seed(0))
    styled = replace(tables, features=tables.features + look[torch.from_numpy(kinds)])
    plan = Plan(steps=80, batch=128, learning_rate=5e-3, warmup=1, weight_decay=0.0, average=0.5)
    begun = FusionNetwork(**{**configured(new_fusion(styled)), "styles": 0})
    taught = train_reader(tmp_path, pictures, styled, begun, plan)
    assert (tmp_path / "reader-curve.csv").read_text().splitlines()[0] == "step,style"
    assert taught.reader is not None
    assert torch.equal(taught.null_image[: len(WAYS)], begun.null_image)
    of_style = styled.features[: len(drawn)][drawn == READ[-1]][:, 0]
    assert torch.allclose(taught.null_image[-1], taught.image_norm(of_style).mean(dim=0), atol=1e-5)
    image, style = Examples(pictures, styled).shown(1000, 512)
    with torch.no_grad():
        read = taught.reader(taught.image_norm(image)).argmax(dim=1)
    assert float((read == style).float().mean()) > 0.9
    before, norm = deepcopy(taught.reader.state_dict()), deepcopy(taught.image_norm.state_dict())
    few = Plan(steps=5, batch=32, learning_rate=1e-2, warmup=1, weight_decay=0.0, average=0.1)
    train_fusion(tmp_path, pictures, styled, taught, few)
    for name, weights in taught.reader.state_dict().items():
        assert torch.equal(before[name], weights), "what a style is does not change by what is drawn"
    for name, weights in taught.image_norm.state_dict().items():
        assert torch.equal(norm[name], weights), "nor does what it is read by"


def test_a_mesh_is_told_from_other_errors():
    even, lines = torch.zeros(1, 4, 32, 32), torch.zeros(1, 4, 32, 32)
    lines[:, :, ::2] = 0.02  # a wave of 0.01
    assert float(mesh_loss(lines, even)) == pytest.approx(0.01)
    assert float(mesh_loss(lines.transpose(-1, -2), even)) == pytest.approx(0.01)
    assert float(mesh_loss(lines, lines)) == pytest.approx(0.0, abs=1e-7)
    assert float(mesh_loss(even + 0.5, even)) == pytest.approx(0.0, abs=1e-7)
    noise = 0.01 * torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0)).sign()
    assert float(mesh_loss(noise, even)) < 0.006, "which is as large, and in no line"


# One short step, for which the slope must tell the way. Through a decoder that has learned nothing, what comes of the
# stage's two long ones is chance: it differs by the machine and by its threads.
SHORT = 0.01


@dataclass(frozen=True)
class Retouching:
    """Untaught parts, the folder in which drawings were retouched by them, and what came of it."""

    folder: Path
    fusion: FusionNetwork
    unet: UNet2DConditionModel
    vae: AutoencoderDC
    rows: np.ndarray
    moves: Tensor

    @property
    def parts(self) -> tuple[FusionNetwork, UNet2DConditionModel, AutoencoderDC]:
        return deepcopy(self.fusion), self.unet, self.vae


SHORTLY = Plan(steps=1, batch=32, learning_rate=SHORT)


@pytest.fixture(scope="module")
def retouching(pictures: TrainingSet, tables: Tables, tmp_path_factory: pytest.TempPathFactory) -> Retouching:
    torch.manual_seed(0)
    folder, parts = tmp_path_factory.mktemp("retouching") / "retouch-1", (new_fusion(tables), new_autoencoder())
    fusion, unet, vae = parts[0], new_generator(*tables.grid_and_channels), parts[1]
    rows, aim = finishes(pictures.emoji), replace(NEARER, steps=1)
    moves = Retoucher(pictures, tables, fusion, unet, vae, aim).moved(folder, rows, SHORTLY)
    return Retouching(folder, fusion, unet, vae, rows, moves)


@torch.no_grad()
def check_they_went_down(
    pictures: TrainingSet, tables: Tables, retouching: Retouching, rows: np.ndarray, moves: Tensor, aim: Aim
) -> None:
    eye, told, size = Onlookers(pictures.emoji, SIZES).at(0)
    real = pictures.each(rows, to_model_range)
    wanted = eye.layers(over_background(pictures.emoji.pixels[rows]), size)

    def lost(tokens: Tensor) -> float:
        latents = on_grid(tokens, tables.square.shape[-1])
        made = retouching.vae.decode(latents / tables.scaling_factor, return_dict=False)[0]
        seen = eye.layers(over_colour(made, torch.ones(1, 3, 1, 1)), size)
        apart = aim.picture * picture_loss(made, real) + aim.layers * layers_apart(seen, wanted)
        return float(apart + aim.told(told, eye.gist(seen), rows))

    said = retouching.fusion.fuse_normalised(by_names(retouching.fusion, pictures, tables, rows))
    first, elsewhere, last = (lost(said + some) for some in (torch.zeros(()), moves.roll(1, 0), moves))
    assert first - last > 2 * abs(first - elsewhere), "where each has gone, not how far"
    far = SHORT * aim.pace
    assert moves.square().mean(dim=(1, 2)).sqrt().tolist() == pytest.approx([far] * len(rows), rel=1e-3)


def test_retouched_drawings_go_where_they_are_told_apart(pictures: TrainingSet, tables: Tables, retouching: Retouching):
    styles = {STYLES[style] for style in pictures.emoji.style[retouching.rows]}
    assert styles == set(RETOUCHED) and not np.setdiff1d(retouching.rows, pictures.emoji.training_rows()).size
    check_they_went_down(pictures, tables, retouching, retouching.rows, retouching.moves, NEARER)


def test_told_apart_drawings_go_ahead_of_other_styles(
    pictures: TrainingSet, tables: Tables, retouching: Retouching, tmp_path: Path
):
    rows, aim = pictures.emoji.training_rows()[::3], replace(TOLD_APART, steps=1)
    moves = Retoucher(pictures, tables, *retouching.parts, aim).moved(tmp_path, rows, SHORTLY)
    check_they_went_down(pictures, tables, retouching, rows, moves, aim)


def test_those_that_are_most_taken_for_another_style_are_told_apart(
    pictures: TrainingSet, tables: Tables, retouching: Retouching, monkeypatch: pytest.MonkeyPatch
):
    learned = pictures.emoji.training_rows()
    known, hand = retouching.rows, Retoucher(pictures, tables, *retouching.parts, TOLD_APART)
    with torch.no_grad():
        said = retouching.fusion.fuse_normalised(by_names(retouching.fusion, pictures, tables, learned))
        made = retouching.vae.decode(on_grid(said, tables.square.shape[-1]) / tables.scaling_factor, return_dict=False)
        drawn, onlookers = over_colour(made[0], torch.ones(1, 3, 1, 1)), Onlookers(pictures.emoji, SIZES)
        looks = [(eye.gist(eye.layers(drawn, size)), told) for eye, told, size in map(onlookers.at, (0, 1))]
        behind = torch.stack([told.behind(gists, learned) for gists, told in looks]).mean(dim=0).numpy()
    noise = 0.01  # that they are drawn from
    monkeypatch.setattr(apart_stage, "MOST", len(known) + 3)
    for at_once in (5, len(known) + 2, len(learned)):
        monkeypatch.setattr(apart_stage, "A_ROUND", at_once)
        chosen = most_taken(hand, learned, known, batch=32)
        assert len(chosen) == min(at_once, len(known) + 3) and bool((np.diff(chosen) > 0).all())
        others = np.setdiff1d(chosen, known)
        assert len(others) <= 3, "there is room for no more"
        left = np.setdiff1d(known, chosen)
        if len(left):
            taken, let_be = (behind[np.isin(learned, some)] for some in (chosen, left))
            assert taken.min() > let_be.max() - 2 * noise
        if len(others):
            further = behind[np.isin(learned, np.setdiff1d(learned, [*known, *others]))]
            assert behind[np.isin(learned, others)].min() > further.max() - 2 * noise
    monkeypatch.setattr(apart_stage, "MOST", 0)
    assert np.array_equal(most_taken(hand, learned, known, batch=32), known), "those go on that are remembered"


def test_what_is_told_apart_is_remembered_beside_the_others(
    pictures: TrainingSet, tables: Tables, retouching: Retouching, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(apart_stage, "TOLD_APART", replace(TOLD_APART, steps=1))
    monkeypatch.setattr(apart_stage, "A_ROUND", 4)
    monkeypatch.setattr(apart_stage, "MOST", len(retouching.rows))
    fusion, unet, vae = retouching.parts
    assert not remembered(fusion, pictures, tables).size
    remember(fusion, pictures, tables, retouching.rows, 10 * retouching.moves)
    assert np.array_equal(remembered(fusion, pictures, tables), retouching.rows)
    before, far = deepcopy(fusion), replace(SHORTLY, learning_rate=0.2)  # beside the tenth that is remembered
    taught = train_apart(tmp_path, pictures, tables, fusion, unet, vae, far)
    rows = torch.load(tmp_path / "apart-1" / "rows.pt", weights_only=True).numpy()
    assert len(rows) == 4 and np.array_equal(remembered(taught, pictures, tables), retouching.rows)

    def changes(some: np.ndarray) -> Tensor:
        asked = by_names(taught, pictures, tables, some)
        with torch.no_grad():
            return taught.fuse_normalised(asked) - before.fuse_normalised(asked)

    assert float(changes(rows).square().mean()) > 0.01
    assert float(changes(np.setdiff1d(pictures.emoji.training_rows(), rows)).square().mean()) < 1e-9
    monkeypatch.setattr(finish_losses, "LineUp", None)  # nobody looks again
    again = train_apart(tmp_path, pictures, tables, deepcopy(before), unet, vae, far)
    for name, weights in taught.state_dict().items():
        assert torch.equal(again.state_dict()[name], weights), name


def test_all_are_seen_as_large_as_what_is_compared_with_them(pictures: TrainingSet):
    onlookers, rows = Onlookers(pictures.emoji, SIZES), pictures.emoji.training_rows()[::5]
    real = over_background(pictures.emoji.pixels[rows])
    for turn in range(2):
        eye, told, size = onlookers.at(turn)
        assert size == SIZES[turn]
        with torch.no_grad():
            likeness = (eye.gist(eye.layers(real, size)) * told.gists_of(rows)).sum(dim=1)
        assert likeness.tolist() == pytest.approx([1.0] * len(rows), abs=1e-4)
        assert onlookers.at(turn + 2)[1] is told, "who has seen all does not look again"


def test_what_was_retouched_is_kept_and_said_by_the_last_layers_alone(
    pictures: TrainingSet, tables: Tables, retouching: Retouching, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(finish_losses, "LineUp", None)  # nobody looks again
    monkeypatch.setattr(retouch_stage, "REMEMBERED", 0)
    monkeypatch.setattr(last_layers, "BATCHES", 1)
    fusion = deepcopy(retouching.fusion)
    before = deepcopy(fusion.state_dict())
    taught = train_retouch(retouching.folder.parent, pictures, tables, fusion, retouching.unet, retouching.vae, SHORTLY)
    changed = {name for name, weights in taught.state_dict().items() if not torch.equal(before[name], weights)}
    assert changed == {"exit.weight", "exit.bias", "exit_block.narrow.weight"}
    asked = by_names(taught, pictures, tables, retouching.rows, name=1)
    made = taught.fuse_normalised(asked) - retouching.fusion.fuse_normalised(asked)
    assert float((made - retouching.moves).square().mean() / retouching.moves.square().mean()) < 0.05


def test_where_the_last_rounds_led_is_remembered(
    pictures: TrainingSet, tables: Tables, retouching: Retouching, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(finish_losses, "LineUp", None)  # nobody looks again
    fusion = deepcopy(retouching.fusion)
    taught = train_retouch(retouching.folder.parent, pictures, tables, fusion, retouching.unet, retouching.vae, SHORTLY)
    assert {"exit.weight", "entry.weight"} <= retouching.fusion.state_dict().keys()
    for name, weights in retouching.fusion.state_dict().items():
        assert torch.equal(taught.state_dict()[name], weights), name
    assert taught.config["remembers"] == len(retouching.rows)


@torch.no_grad()
def test_what_is_remembered_is_said_by_any_name_and_changes_nothing_else(pictures: TrainingSet, tables: Tables):
    torch.manual_seed(0)
    drawings, places = pictures.emoji.training_rows(), tables.means().shape[1:]
    rows, others = drawings[::3], np.setdiff1d(drawings, drawings[::3])
    meant = torch.randn(len(pictures.emoji.concepts), 512)[tables.caption_concept]
    alike, named = meant + 0.1 * torch.randn(meant.shape), np.ones(len(meant), dtype=bool)
    tables = replace(tables, captions=alike, caption_is_name=named)
    fusion, moves = new_fusion(tables).eval(), torch.randn(len(rows), *places)
    begun = deepcopy(fusion)

    def changes(some: np.ndarray, name: int, since: FusionNetwork = begun) -> Tensor:
        asked = by_names(fusion, pictures, tables, some, name)
        return fusion.fuse_normalised(asked) - since.fuse_normalised(asked)

    assert remember(fusion, pictures, tables, rows, moves) > 0.85
    first = deepcopy(fusion)
    for name in (0, 1):
        assert float((changes(rows, name) - moves).square().mean() / moves.square().mean()) < 0.2
        assert not changes(others, name).any()
    scene, unknown = fusion.image_norm(tables.features[-1:, 0]), 3 * fusion.null_image[:1]
    for shown in (scene, unknown):
        joined = torch.cat([fusion.text_norm(alike), shown.expand(len(alike), -1)], dim=1)
        assert torch.equal(fusion.fuse_normalised(joined), begun.fuse_normalised(joined)), "in no style that is known"
    assert remember(fusion, pictures, tables, rows[::2], moves[::2]) > 0.85
    assert float((changes(rows[::2], 0, first) - moves[::2]).square().mean() / moves.square().mean()) < 0.5
    assert not changes(rows[1::2], 0).any(), "only the last are remembered"


def test_answers_move_and_others_stay(pictures: TrainingSet, tables: Tables, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(last_layers, "BATCHES", 1)
    torch.manual_seed(0)
    drawings, places = pictures.emoji.training_rows(), tables.means().shape[1:]
    rows, others = drawings[::3], np.setdiff1d(drawings, drawings[::3])
    fusion, moves = new_fusion(tables), torch.randn(len(rows), *places)
    begun = deepcopy(fusion)
    share = move_answers(fusion, pictures, tables, rows, moves)

    def changes(some: np.ndarray, name: int) -> Tensor:
        asked = by_names(fusion, pictures, tables, some, name)
        return fusion.fuse_normalised(asked) - begun.fuse_normalised(asked)

    with torch.no_grad():
        assert share == pytest.approx(float((changes(rows, 0) * moves).sum() / moves.square().sum()), rel=1e-3)
        for name in (0, 1):
            assert float((changes(rows, name) - moves).square().mean()) < 0.05
            assert float(changes(others, name).square().mean()) < 0.05
        scenes = torch.cat([fusion.text_norm(tables.scene_captions[:, 0]), fusion.null_image[[0] * 16]], dim=1)
        moved = fusion.fuse_normalised(scenes) - begun.fuse_normalised(scenes)
        assert float(moved.square().mean()) < 0.05


def test_every_stage_learns_from_all_domains(pictures: TrainingSet, tables: Tables, tmp_path: Path):
    few = Plan(steps=5, batch=8, learning_rate=1e-3, warmup=1, weight_decay=0.0, average=0.1)
    torch.manual_seed(0)
    eye = train_image_encoder(tmp_path, pictures, new_image_encoder(), replace(few, batch=16))
    vae = train_autoencoder(tmp_path, pictures, new_autoencoder(), few)
    fusion = train_fusion(tmp_path, pictures, tables, new_fusion(tables), replace(few, batch=32))
    unet = train_generator(tmp_path, pictures, tables, fusion, new_generator(*tables.grid_and_channels), few)
    before = deepcopy(vae)
    unet, vae = train_finish(tmp_path, pictures, tables, fusion, eye, unet, vae, few)
    kept = [
        torch.equal(one, other)
        for one, other in zip(before.encoder.parameters(), vae.encoder.parameters(), strict=True)
    ]
    assert all(kept), "the latents stay what they are"
    assert not torch.equal(before.decoder.conv_in.weight, vae.decoder.conv_in.weight)
    for stage in ("vision", "autoencoder", "fusion", "generator", "finish"):
        head, *rows = (tmp_path / f"{stage}-curve.csv").read_text().splitlines()
        assert all(math.isfinite(float(value)) for row in rows for value in row.split(",")), (stage, head)
    assert bool(unet.conv_out.weight.any())
    assert torch.isfinite(fusion(torch.randn(1, 512), None)).all()


def test_a_decoder_made_deeper_draws_what_it_drew():
    torch.manual_seed(0)
    shallow = AutoencoderDC.from_config({**new_autoencoder().config, "decoder_layers_per_block": (1, 2, 2, 2)})
    assert isinstance(shallow, AutoencoderDC)
    deeper = deepened(shallow)
    assert tuple(deeper.config["decoder_layers_per_block"]) == DECODER_LAYERS
    latents = torch.randn(1, 16, 4, 4)
    with torch.no_grad():
        after, before = (vae.decode(latents, return_dict=False)[0] for vae in (deeper, shallow))
        assert torch.allclose(after, before, atol=1e-5)
    assert deepened(deeper) is deeper


def test_the_imagenet_network_sees_what_is_alike():
    eye = ImageNetEye()

    def loss(made: Tensor, wanted: Tensor) -> Tensor:
        return layers_apart(eye.layers(made), eye.layers(wanted))

    source = torch.Generator().manual_seed(0)
    real = torch.nn.functional.interpolate(torch.rand(2, 3, 8, 8, generator=source), (64, 64), mode="bilinear")
    made = (real + 0.05 * torch.randn(real.shape, generator=source)).requires_grad_()
    near = loss(made, real)
    near.backward()
    assert float(loss(real, real)) < 1e-6 < float(near.detach()) < float(loss(real.roll(1, 0), real))
    assert made.grad is not None and bool(made.grad.any())


def test_a_drawing_is_told_from_its_concept_and_from_its_style(pictures: TrainingSet):
    eye, emoji = ImageNetEye(), pictures.emoji
    told = LineUp(eye, emoji)
    rows = emoji.training_rows()[:4]
    drawn = over_background(emoji.pixels[rows])
    made = (0.9 * drawn + 0.05).requires_grad_()
    near = told(eye.gist(eye.layers(made)), rows)
    near.backward()
    assert made.grad is not None and bool(made.grad.any())
    assert float(near.detach()) < float(told(eye.gist(eye.layers(drawn.roll(1, 0))), rows)), (
        "each is another style's here"
    )
    held = int(np.flatnonzero((emoji.concept == HELD[0]) & (emoji.style == HELD[1]))[0])
    assert held not in told.rows
    for ranks in told.ranks(told.gists_of(rows), rows):
        assert ranks.tolist() == [0] * len(rows)
    of_style, of_concept = told.ranks(told.gists_of(rows[::-1].copy()), rows)
    assert bool((of_concept[[0, 3]] > 0).all()) and of_style.shape == (4,)


def test_how_far_another_style_is_ahead_is_told(pictures: TrainingSet):
    told, emoji = LineUp(ImageNetEye(), pictures.emoji), pictures.emoji
    rows = np.array([row for row in emoji.training_rows() if emoji.concept[row] == 0])
    alike = told.gists_of(rows) @ told.gists_of(rows).T
    nearest = alike.masked_fill(torch.eye(len(rows), dtype=torch.bool), -1).amax(dim=1)
    most = NEAR * np.log(len(rows) - 1)  # by which a smooth maximum may be more than the largest
    behind = told.behind(told.gists_of(rows), rows)
    assert bool((behind >= nearest - 1 - 1e-5).all() and (behind <= nearest - 1 + most + 1e-5).all())
    with torch.autocast("cpu", torch.bfloat16):  # which knows no difference of .002
        assert torch.equal(told.behind(told.gists_of(rows), rows), behind)
    instead = told.behind(told.gists_of(rows.copy()[[1, 0]]), rows[:2])
    assert bool((instead >= 1 - alike[0, 1] - 1e-5).all()), "each shows the other's style"
    gists = told.gists_of(rows).requires_grad_()
    only = replace(emoji, concept=np.arange(len(emoji.concept)))  # each drawn in one style
    alone = LineUp(ImageNetEye(), only).behind(gists, rows)
    alone.sum().backward()
    assert bool((alone < -1).all()) and gists.grad is not None and bool(gists.grad.isfinite().all())


def test_no_number_is_unknown():
    names = [f"thing {number} 东西" for number in range(10)] * 3
    said = len(names)
    captions = Captions(names, np.zeros((said, 512), np.float32), np.arange(said), np.ones(said, bool))
    tokenizer = build_tokenizer(captions, vocabulary=200)
    seen = {tuple(tokenizer(f"thing {number}")["input_ids"]) for number in range(361)}
    assert len(seen) == 361 and not any(tokenizer.unk_token_id in ids for ids in seen)


def test_an_encoder_made_longer_says_of_short_texts_what_it_said(shipped: Checkpoint, warm: ModelCache):
    with shipped.use(warm, "text_encoder") as encoder, torch.inference_mode():
        ids = torch.tensor([[2, 100, 200, 3]])
        before = encoder(input_ids=ids).text_embeds
        longer = lengthened(deepcopy(encoder), 60).eval()
        assert torch.equal(longer(input_ids=ids).text_embeds, before)
        assert longer(input_ids=torch.full((1, 60), 5)).text_embeds.isfinite().all()
