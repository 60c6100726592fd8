"""Image encoders on disk: real classes at tiny sizes, in folders and single files; layers, regions, batches, styles."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pipeline.checkpoints import Checkpoint, CheckpointError
from pipeline.families import FAMILIES
from pipeline.fusion import fuse
from pipeline.image_encoder import _features, _Seen, encode_image
from pipeline.model_cache import ModelCache
from pipeline.vision.gram import gram_matrix
from pipeline.vision.image_encoders import _config_of_header, open_image_encoder

from .devices import FakeDevice

VIT: dict[str, Any] = {
    "hidden_size": 128,  # two heads of 64 channels, as a file's header is read
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
DINO = {key: VIT[key] for key in VIT if key != "intermediate_size"}
MAKE: dict[str, Callable[[], Any]] = {
    "clip": lambda: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VIT, projection_dim=24)),
    "clip-bare": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VIT)),
    "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VIT)),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**DINO)),
    "dinov2-registers": lambda: transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**DINO)),
    "convnext": lambda: transformers.ConvNextModel(
        transformers.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
    ),
    "resnet": lambda: transformers.ResNetModel(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ),
}
TRANSFORMERS = ("clip", "clip-bare", "siglip", "dinov2", "dinov2-registers")
EYE = FAMILIES["DuetMiniPipeline"].image_size  # pixels; a picture of another size is resized, and its halves mix
WIDTHS = {"clip": (128, 24), "convnext": (32, 32), "resnet": (16, 16)}  # of tokens and pooled; of the rest 128


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encoders")
    for seed, (name, make) in enumerate(MAKE.items()):
        torch.manual_seed(seed)
        make().save_pretrained(root / name)
    return root


def picture(batch: int = 1, seed: int = 0, side: int = 56) -> torch.Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def overflow(module: torch.nn.Module, given: object, output: torch.Tensor) -> torch.Tensor:
    return output * torch.inf if output.dtype == torch.float16 else output


def test_one_that_overflows_in_half_precision_looks_once_more(warm: ModelCache, shipped: Checkpoint, folders: Path):
    cache, encoder = ModelCache(FakeDevice(), 2**32), open_image_encoder(folders / "resnet")
    with encoder.use(cache) as network:
        assert next(network.parameters()).dtype == torch.float16
        network.embedder.register_forward_hook(overflow)
    seen = encode_image(cache, shipped, picture(), encoder=encoder)
    assert any("once more in float32" in notice for notice in seen.notices)
    torch.testing.assert_close(seen.pooled, encode_image(warm, shipped, picture(), encoder=encoder).pooled)
    with encoder.use(cache, torch.float32) as network:
        network.embedder.register_forward_hook(lambda module, given, output: output * torch.nan)
    with pytest.raises(FloatingPointError, match=r"resnet.*: the image encoder gave values that are no numbers"):
        encode_image(cache, shipped, picture(), encoder=encoder)


def test_many_tokens_do_not_overflow_half_precision():
    """Of each mean the sum is beyond what float16 holds."""
    tokens = torch.full((1, 256 * 256, 4), 2.0, dtype=torch.float16)
    seen = _Seen(tokens, None, (256, 256), "stages[0]")
    assert _features(seen, "cnn", None).pooled.tolist() == [[2.0] * 4]


@pytest.mark.parametrize("name", MAKE)
def test_a_folder_gives_tokens_pooled_and_grid(warm: ModelCache, shipped: Checkpoint, folders: Path, name: str):
    encoder = open_image_encoder(folders / name)
    features = encode_image(warm, shipped, picture(2), encoder=encoder)
    width, pooled = WIDTHS.get(name, (128, 128))
    height = features.grid[0]
    assert features.tokens.shape == (2, height * height, width) and features.pooled.shape == (2, pooled)
    assert features.grid == ((4, 4) if name in TRANSFORMERS else (7, 7) if name == "convnext" else (28, 28))
    assert features.space.model == encoder.identity and features.space.model.startswith(name)
    assert not torch.allclose(features.pooled[0], features.pooled[1])


def test_it_is_what_the_library_s_own_model_gives(warm: ModelCache, shipped: Checkpoint, folders: Path):
    model = transformers.CLIPVisionModelWithProjection.from_pretrained(folders / "clip").eval()
    processor = transformers.CLIPImageProcessorPil(do_resize=False, do_center_crop=False, do_rescale=False)
    with torch.inference_mode():
        pixels = torch.as_tensor(processor(picture()[0].numpy(), return_tensors="np")["pixel_values"])
        expected = model(pixels, output_hidden_states=True)
    found = encode_image(warm, shipped, picture(), encoder=open_image_encoder(folders / "clip"))
    assert torch.allclose(found.pooled, expected.image_embeds, atol=1e-5)
    assert torch.allclose(found.tokens, expected.last_hidden_state[:, 1:], atol=1e-5)
    before = encode_image(warm, shipped, picture(), encoder=open_image_encoder(folders / "clip"), layer=-2)
    assert torch.allclose(before.tokens, expected.hidden_states[-2][:, 1:], atol=1e-5)
    assert torch.allclose(before.pooled, before.tokens.mean(dim=1), atol=1e-5)
    assert before.space.layer == "mean of hidden_states[2]" and found.space.layer == "image_embeds"


@pytest.mark.parametrize(
    ("name", "prefix"),
    [*((name, "") for name in TRANSFORMERS), *((name, "vision_model.") for name in ("clip", "clip-bare", "siglip"))],
)
def test_a_single_file_is_told_by_its_header(
    warm: ModelCache, shipped: Checkpoint, folders: Path, tmp_path: Path, name: str, prefix: str
):
    tensors = load_file(folders / name / "model.safetensors")
    bare = {key.removeprefix("vision_model."): value for key, value in tensors.items()}
    renamed = {key if "visual_projection" in key else prefix + key: value for key, value in bare.items()}
    others = {"text_model.embeddings.token_embedding.weight": torch.zeros(4, 4), "logit_scale": torch.zeros(1)}
    file = tmp_path / f"{name}.safetensors"
    save_file(renamed | (others if prefix else {}), file)
    from_file = encode_image(warm, shipped, picture(), encoder=open_image_encoder(file))
    from_folder = encode_image(warm, shipped, picture(), encoder=open_image_encoder(folders / name))
    assert torch.allclose(from_file.pooled, from_folder.pooled, atol=1e-5)
    assert torch.allclose(from_file.tokens, from_folder.tokens, atol=1e-5)


def published(model_class: Any, config: Any) -> tuple[dict[str, tuple[int, ...]], Any]:
    """The header of a model at full size, which takes no memory, and its configuration."""
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in model_class(config).state_dict().items()}, config


def test_the_published_files_are_told_by_their_shapes():
    """ViT-H of OpenCLIP and SigLIP so400m, as models/clip_vision holds them."""
    huge: dict[str, Any] = {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
    }
    clip = transformers.CLIPVisionConfig(**huge, patch_size=14, projection_dim=1024, hidden_act="gelu")
    sized: dict[str, Any] = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
    }
    siglip = transformers.SiglipVisionConfig(**sized, patch_size=14, image_size=384)
    for shapes, config in (
        published(transformers.CLIPVisionModelWithProjection, clip),
        published(transformers.SiglipVisionModel, siglip),
    ):
        told = _config_of_header(Path("file.safetensors"), shapes)
        assert {key: value for key, value in told.items() if getattr(config, key) != value} == {}


@pytest.mark.parametrize(("name", "width"), [("efficientnet_b0", 1280), ("convnext_atto", 320)])
def test_timm_s_networks(warm: ModelCache, shipped: Checkpoint, tmp_path: Path, name: str, width: int):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False)
    folder = save_timm(tmp_path / name, name, network.state_dict())
    features = encode_image(warm, shipped, picture(2, side=96), encoder=open_image_encoder(folder))
    assert features.pooled.shape == (2, width) and features.grid == (3, 3) and features.space.layer == "pooled"
    with torch.inference_mode():
        mean, std = torch.full((3, 1, 1), 0.4), torch.full((3, 1, 1), 0.2)
        network.reset_classifier(0)
        expected = network.eval()((picture(2, side=96) - mean) / std)
    assert torch.allclose(features.pooled, expected, atol=1e-4)
    first = encode_image(warm, shipped, picture(2, side=96), encoder=open_image_encoder(folder), layer=0)
    assert first.grid[0] > features.grid[0] and first.space.layer == "mean of stages[0]"


def save_timm(folder: Path, name: Any, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    told = {"mean": [0.4] * 3, "std": [0.2] * 3, "input_size": [3, 96, 96]}
    (folder / "config.json").write_text(json.dumps({"architecture": name, "num_classes": 1000, "pretrained_cfg": told}))
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors")
    return folder


def test_a_layer_that_is_not_there(warm: ModelCache, shipped: Checkpoint, folders: Path):
    for layer in (4, -5):
        with pytest.raises(ValueError, match=rf"layer must be -4 to 3, as the encoder has 4 layers, got {layer}"):
            encode_image(warm, shipped, picture(), encoder=open_image_encoder(folders / "siglip"), layer=layer)


def test_the_small_models_layers(warm: ModelCache, shipped: Checkpoint):
    last, named = (encode_image(warm, shipped, picture(side=64), layer=layer) for layer in (-1, 3))
    assert torch.equal(last.pooled, named.pooled) and last.space == named.space
    middle = encode_image(warm, shipped, picture(side=64), layer=-2)
    places = shipped.family.image_size // 8
    assert middle.tokens.shape == (1, places**2, 128) and middle.grid == (places, places)
    with pytest.raises(ValueError, match=r"pooler_output.*hidden_states\[2\]"):
        fuse(warm, shipped, None, middle)


def halves() -> tuple[torch.Tensor, torch.Tensor]:
    """A picture of two halves, and the mask of its left one."""
    half = EYE // 2
    mask = torch.zeros(1, EYE, EYE)
    mask[:, :, :half] = 1
    return torch.cat([picture(seed=1, side=EYE)[..., :half], picture(seed=2, side=EYE)[..., half:]], dim=-1), mask


def test_pooling_over_a_region_is_the_weighted_mean_of_its_tokens(warm: ModelCache, shipped: Checkpoint):
    pixels, mask = halves()
    whole = encode_image(warm, shipped, pixels)
    region = encode_image(warm, shipped, pixels, mask, region="pool")
    assert torch.equal(region.tokens, whole.tokens), "the encoder sees what surrounds the region"
    left = whole.tokens.unflatten(1, whole.grid)[:, :, : whole.grid[1] // 2].flatten(1, 2).mean(dim=1)
    assert torch.allclose(region.pooled, left, atol=1e-5)
    middle = whole.grid[1] // 2
    assert region.weight is not None
    assert region.weight.unflatten(1, region.grid)[0, 0].tolist() == [*middle * [1], *middle * [0]]
    assert region.space == whole.space and fuse(warm, shipped, None, region).tokens.isfinite().all()
    everything = encode_image(warm, shipped, pixels, torch.ones(1, EYE, EYE), region="pool")
    assert torch.allclose(everything.pooled, whole.pooled, atol=1e-5)


def test_a_vision_transformer_s_region_has_a_space_of_its_own(warm: ModelCache, shipped: Checkpoint, folders: Path):
    pixels, mask = halves()
    encoder = open_image_encoder(folders / "clip")
    whole, region = (encode_image(warm, shipped, pixels, mask, encoder, region=how) for how in ("white", "pool"))
    assert whole.pooled.shape == (1, 24) and region.pooled.shape == (1, 128)
    assert region.space.layer == "mean of tokens before image_embeds"


@pytest.mark.parametrize("half", [0.5, 0.25])
def test_a_soft_mask_counts_by_its_share(warm: ModelCache, shipped: Checkpoint, half: float):
    pixels, mask = halves()
    soft = encode_image(warm, shipped, pixels, mask + half * (1 - mask), region="pool")
    whole = encode_image(warm, shipped, pixels)
    columns = whole.tokens.unflatten(1, whole.grid).mean(dim=1)
    shares = torch.tensor([1.0, half]).repeat_interleave(whole.grid[1] // 2)
    assert torch.allclose(soft.pooled[0], (columns[0] * shares[:, None]).sum(dim=0) / shares.sum(), atol=1e-5)


def test_a_mask_that_hides_everything(warm: ModelCache, shipped: Checkpoint):
    with pytest.raises(ValueError, match="hides all of picture 1"):
        mask = torch.stack([torch.ones(64, 64), torch.zeros(64, 64)])
        encode_image(warm, shipped, picture(2, side=64), mask, region="pool")


def test_gram_statistics_forget_the_place_and_keep_the_style(warm: ModelCache, shipped: Checkpoint):
    tokens = torch.randn(2, 16, 5, generator=torch.Generator().manual_seed(0))
    gram = gram_matrix(tokens)
    expected = torch.stack([picture.T @ picture / 16 for picture in tokens])
    assert torch.allclose(gram, expected, atol=1e-6) and torch.allclose(gram, gram.transpose(1, 2))
    assert torch.allclose(gram_matrix(tokens[:, torch.randperm(16)]), gram, atol=1e-6)
    weight = torch.cat([torch.ones(2, 8), torch.zeros(2, 8)], dim=1)
    assert torch.allclose(gram_matrix(tokens, weight), gram_matrix(tokens[:, :8]), atol=1e-6)
    features = encode_image(warm, shipped, picture(side=64), layer=1, gram=True)
    assert features.gram is not None and features.gram.shape == (1, 64, 64)
    assert encode_image(warm, shipped, picture(side=64)).gram is None


def test_reference_pictures_are_averaged_or_kept(warm: ModelCache, shipped: Checkpoint):
    kept = encode_image(warm, shipped, picture(3, side=64), gram=True)
    mean = encode_image(warm, shipped, picture(3, side=64), gram=True, batch="average")
    assert kept.pooled.shape == (3, 256) and mean.pooled.shape == (1, 256)
    assert torch.allclose(mean.pooled[0], kept.pooled.mean(dim=0), atol=1e-6)
    assert torch.allclose(mean.tokens[0], kept.tokens.mean(dim=0), atol=1e-6)
    assert kept.gram is not None and mean.gram is not None
    assert torch.allclose(mean.gram[0], kept.gram.mean(dim=0), atol=1e-5)
    assert any("3 pictures" in notice for notice in mean.notices) and fuse(warm, shipped, None, mean)


def test_an_average_of_regions_takes_each_place_where_it_counts(warm: ModelCache, shipped: Checkpoint):
    left = torch.cat([torch.ones(EYE, EYE // 2), torch.zeros(EYE, EYE // 2)], dim=1)
    masks = torch.stack([left, 1 - left])
    kept = encode_image(warm, shipped, picture(2, side=EYE), masks, region="pool")
    mean = encode_image(warm, shipped, picture(2, side=EYE), masks, region="pool", batch="average")
    first, second, both = (each.unflatten(0, mean.grid) for each in (*kept.tokens, mean.tokens[0]))
    middle = mean.grid[1] // 2
    assert torch.allclose(both[:, :middle], first[:, :middle], atol=1e-6)
    assert torch.allclose(both[:, middle:], second[:, middle:], atol=1e-6)


@pytest.mark.parametrize("option", ["region", "batch"])
def test_an_unknown_option_is_named(warm: ModelCache, shipped: Checkpoint, option: str):
    with pytest.raises(ValueError, match=f"{option} must be one of .*, got 'blue'"):
        encode_image(warm, shipped, picture(), **{option: "blue"})  # type: ignore[arg-type]


def test_the_cache_holds_it_once(shipped: Checkpoint, cache: ModelCache, folders: Path):
    for _ in range(2):
        encode_image(cache, shipped, picture(), encoder=open_image_encoder(folders / "dinov2"))
    assert (cache.stats().misses, cache.stats().hits) == (1, 1)
    assert [entry.pins for entry in cache.stats().entries] == [0]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"model_type": "bert"}, "model_type .*siglip_vision_model.* found 'bert'"),
    "no kind": ({"model_type": None}, "model_type .* found None"),
    "another size": ({"hidden_size": 64}, "are missing or of another shape, the first being"),
    "another depth": ({"num_hidden_layers": 5}, "missing or of another shape"),
    "too wide for its weights": (
        {"hidden_size": 2**20, "intermediate_size": 2**20},
        "_size to suit weights up to 384",
    ),
    "too deep for its weights": ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "a size that is none": ({"image_size": "large"}, "image_size of 1 to 4096 pixels, found 'large'"),
    "a patch larger than the picture": ({"patch_size": 57}, "image_size of 1 to 4096 pixels, found 56 by 57"),
    "code from elsewhere": ({"attn_implementation": "someone/kernel"}, "someone/kernel"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder_is_refused_by_name(
    shipped: Checkpoint, cache: ModelCache, folders: Path, tmp_path: Path, name: str
):
    changes, said = BAD[name]
    folder = tmp_path / "bad"
    folder.mkdir()
    config = json.loads((folders / "siglip" / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((folders / "siglip" / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=f"bad.*{said}"):
        encode_image(cache, shipped, picture(), encoder=open_image_encoder(folder))
    assert cache.stats().entries == ()


def test_bad_files_are_refused_by_name(tmp_path: Path, folders: Path):
    odd = tmp_path / "odd.safetensors"
    save_file({"conv_stem.weight": torch.zeros(2, 2)}, odd)
    with pytest.raises(CheckpointError, match=r"odd.*CLIP's, SigLIP's or DINOv2's.*conv_stem\.weight"):
        open_image_encoder(odd)
    odd.write_bytes(b"<!doctype html><html></html>")
    with pytest.raises(CheckpointError, match="a web page"):
        open_image_encoder(odd)
    (tmp_path / "pickle.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=r"folder or a \.safetensors file"):
        open_image_encoder(tmp_path / "pickle.bin")
    with pytest.raises(CheckpointError, match="missing"):
        open_image_encoder(tmp_path / "missing.safetensors")


@pytest.mark.parametrize("name", ["hf-hub:someone/model", "../convnext", "Convnext", 7, "no_such_network", "resnet18"])
def test_a_timm_name_is_never_looked_for_elsewhere(shipped: Checkpoint, cache: ModelCache, tmp_path: Path, name: Any):
    pytest.importorskip("timm")
    folder = save_timm(tmp_path / "bad", name, {"stem.weight": torch.zeros(2_000_000)})
    with pytest.raises(CheckpointError, match=r"bad.*expected"):
        encode_image(cache, shipped, picture(), encoder=open_image_encoder(folder))


def test_timm_not_installed_says_so(
    shipped: Checkpoint, cache: ModelCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = save_timm(tmp_path / "net", "convnext_atto", {"stem.weight": torch.zeros(2)})
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(CheckpointError, match="pip install timm"):
        encode_image(cache, shipped, picture(), encoder=open_image_encoder(folder))
