"""Scenes, their judge, and one or two steps of every training stage, on emoji that are plain squares."""

from __future__ import annotations

import json
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(scope="module")
def scenes(scripts_importable: None) -> Any:
    import scenes

    return scenes


def colour(index: int) -> tuple[int, int, int]:
    return (40 + 7 * index, 20 * (index % 5), 255 - 10 * index)


@pytest.fixture(scope="module")
def work(scenes: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder that needs no network: each emoji is a square of its own colour."""
    folder = tmp_path_factory.mktemp("models")
    package = folder / "emoji" / "package"
    pictures = package / "img" / "google" / "64"
    pictures.mkdir(parents=True)
    for index, code in enumerate(scenes.EMOJI.values()):
        Image.new("RGBA", (64, 64), (*colour(index), 255)).save(pictures / f"{code}.png")
    (package / "emoji.json").write_text(json.dumps([{"image": f"{code}.png"} for code in scenes.EMOJI.values()]))
    return folder


@pytest.fixture(scope="module")
def shop(work: Path) -> Any:
    from training_stage import Workshop

    return Workshop(work, "cpu")


def combined(scene: Any) -> set[tuple[str, ...]]:
    names = sorted(thing.name for thing in scene.things)
    return set(combinations(names, 2)) if len(names) > 1 else {(names[0], scene.ground)}


def test_held_out_scenes_contain_a_combination_that_no_training_scene_contains(scenes: Any) -> None:
    rng = random.Random(3)
    trained = set().union(*(combined(scenes.draw_scene(rng)) for _ in range(4000)))
    unseen = scenes.unseen_captions(100)
    assert len({scene.caption for scene in unseen}) == 100
    assert all(combined(scene) - trained for scene in unseen)
    assert {word for pair in trained for word in pair} == {*scenes.NAMES, *scenes.COLOURS}


def test_captions_describe_the_painted_scene(scenes: Any, shop: Any) -> None:
    rng = random.Random(0)
    for _ in range(50):
        scene = scenes.jittered(scenes.draw_scene(rng), rng)
        pixels = shop.painter.paint(scene)
        for thing in scene.things:
            x, y = (round(c) for c in thing.centre)
            assert tuple(pixels[y, x]) == colour(scenes.NAMES.index(thing.name))
            assert f"{thing.size} {thing.name}".strip() in scene.caption
        assert tuple(pixels[0, 0]) == scenes.GROUNDS[scene.ground]
        assert scene.caption.endswith(f" on {scene.ground}")
        if " left of " in scene.caption:
            assert scene.things[0].centre[0] < scene.things[1].centre[0]


def test_a_thing_that_leaves_the_picture_is_cut_off(scenes: Any, shop: Any) -> None:
    thing = scenes.Thing("cat", "large", (60.0, 2.0))
    pixels = shop.painter.paint(scenes.Scene((thing,), "blue", "a large cat on blue"))
    cat = (pixels == np.array(colour(scenes.NAMES.index("cat")), np.uint8)).all(axis=-1)
    assert cat[:20, 42:].all()
    assert cat.sum() == 20 * 22


def test_layouts_agree_with_the_painter(scenes: Any, shop: Any) -> None:
    from train_models import layouts

    rng = random.Random(1)
    drawn = [scenes.draw_scene(rng) for _ in range(20)]
    for scene, grid in zip(drawn, layouts(drawn), strict=True):
        cells = shop.painter.paint(scene)[4::8, 4::8].reshape(-1, 3)
        for value, cell in zip(grid.tolist(), cells, strict=True):
            known = colour(value) if value < len(scenes.NAMES) else scenes.GROUNDS[scene.ground]
            assert tuple(cell) == known


class Oracle(torch.nn.Module):
    """A judge that knows the scenes, with each thing at its place or mirrored."""

    def __init__(self, scenes: Any, shown: list[Any], mirrored: bool) -> None:
        super().__init__()
        self.cells = torch.full((len(shown), len(scenes.NAMES), 8, 8), -5.0)
        self.ground = torch.zeros(len(shown), len(scenes.COLOURS))
        for i, scene in enumerate(shown):
            self.ground[i, scenes.COLOURS.index(scene.ground)] = 1
            for thing in scene.things:
                x, y = (int(c // 8) for c in thing.centre)
                at = (7 - y, 7 - x) if mirrored else (y, x)
                self.cells[(i, scenes.NAMES.index(thing.name), *at)] = 5.0

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cells, self.ground


def test_the_score_counts_things_grounds_and_places(scenes: Any) -> None:
    from scene_judge import Score, score

    asked = [scene for scene in scenes.unseen_captions(60) if len(scene.things) > 1]
    blank = torch.zeros(len(asked), 3, 64, 64)
    assert score(Oracle(scenes, asked, mirrored=False), blank, asked) == Score(1.0, 1.0, 1.0, 1.0)
    assert score(Oracle(scenes, asked, mirrored=True), blank, asked) == Score(1.0, 1.0, 1.0, 0.0)
    others = asked[1:] + asked[:1]
    wrong = score(Oracle(scenes, others, mirrored=False), blank, asked)
    same = [combined(a) == combined(b) for a, b in zip(asked, others, strict=True)]
    assert wrong.things == pytest.approx(sum(same) / len(same))
    assert wrong.ground < 0.5


def test_the_models_are_of_similar_size(scripts_importable: None) -> None:
    import small_models
    from text_training import CONTEXT, VOCABULARY

    with torch.device("meta"):
        built = [small_models.new_unet(), small_models.new_dit(), small_models.new_mmdit()]
        built += [small_models.new_video_unet(), small_models.new_gpt(VOCABULARY, CONTEXT)]
    sizes = [sum(p.numel() for p in model.parameters()) for model in built]
    assert max(sizes) < 1.15 * min(sizes)
    assert min(sizes) > 4.2e6


def test_missing_emoji_are_reported(scenes: Any, tmp_path: Path) -> None:
    (tmp_path / "emoji.json").write_text("[]")
    with pytest.raises(SystemExit, match=r"has no pictures .*fetch emoji-datasource-google again"):
        scenes.Painter(tmp_path)


@pytest.fixture(scope="module")
def stages(shop: Any) -> Any:
    """The shared stages after one step each."""
    import train_models

    for stage in ("teacher", "text", "judge"):
        train_models.STAGES[stage][0](shop, 1)
    train_models.train_vae(shop, 1, batch=4)
    return train_models.STAGES


CALLS = {
    "unet": {"guidance_scale": 4.0},
    "lcm": {"guidance_scale": 1.0},
    "dit": {"use_resolution_binning": False, "max_sequence_length": 16},
    "mmdit": {"guidance_scale": 4.0, "max_sequence_length": 16},
    "video": {"num_frames": 8},
}


@pytest.mark.parametrize("model", CALLS)
def test_a_model_trains_resumes_and_is_written_as_a_working_pipeline(
    model: str, stages: Any, shop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import denoiser_training
    import training_stage
    from diffusers import DiffusionPipeline
    from shipped_models import assembled, write

    for pool, size in (("pool_of_scenes", 32), ("pool_of_clips", 8)):
        monkeypatch.setattr(getattr(training_stage, pool), "__defaults__", (size,))
    monkeypatch.setattr(denoiser_training, "BATCH", 4)
    if model == "lcm" and not (shop.work / "unet.pt").exists():
        stages["unet"][0](shop, 1)
    stages[model][0](shop, 1)
    before = torch.load(shop.work / f"{model}.pt", weights_only=True)
    stages[model][0](shop, 2)
    after = torch.load(shop.work / f"{model}.pt", weights_only=True)
    assert (before["step"], after["step"]) == (1, 2)
    assert any(not torch.equal(before["module"][k], after["module"][k]) for k in before["module"])
    write(assembled(shop, model), tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.float32)
    drawn = pipeline("a cat on blue", num_inference_steps=2, output_type="np", **CALLS[model])
    picture = np.asarray(drawn.frames if model == "video" else drawn.images)
    assert picture.shape == ((1, 8, 64, 64, 3) if model == "video" else (1, 64, 64, 3))
    assert np.isfinite(picture).all()


def test_the_gpt_learns_from_docstrings_and_holds_out_some_files(shop: Any, tmp_path: Path) -> None:
    from text_training import CONTEXT, held_out, texts, train_gpt, write_gpt
    from transformers import AutoTokenizer, GPT2LMHeadModel

    for i in range(40):
        (tmp_path / f"module{i}.py").write_text(f'"""Module {i}: {" ".join(str(i + j) for j in range(300))}."""\n')
    (tmp_path / "wrong.py").write_text("def (")
    train, test = (list(texts(wanted, tmp_path)) for wanted in (False, True))
    assert len(train) + len(test) == 40
    kept = [i for i in range(40) if held_out(Path(f"module{i}.py"))]
    assert kept
    assert {text.split(":")[0] for text in test} == {f"Module {i}" for i in kept}
    train_gpt(shop, 1, batch=1, library=tmp_path)
    write_gpt(shop, tmp_path / "gpt")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "gpt")(train[0], return_tensors="pt").input_ids
    assert GPT2LMHeadModel.from_pretrained(tmp_path / "gpt")(tokens[:, :CONTEXT]).logits.shape[-1] == 4096


def _unprefixed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a text encoder under names that do not depend on the version of transformers."""
    return {name.removeprefix("text_model."): tensor for name, tensor in state.items()}


def test_a_finished_pipeline_replaces_the_stages_that_train_its_parts(work: Path) -> None:
    from safetensors.torch import load_file
    from train_models import order
    from training_stage import Workshop, drawn, encoder, small_vae, text_encoder

    assert order("mmdit", shared=True) == ["judge", "mmdit"]
    assert order("lcm", shared=True) == ["judge", "unet", "lcm"]
    assert order("mmdit") == ["teacher", "vae", "text", "judge", "mmdit"]
    with pytest.raises(SystemExit, match="--shared already provides what vae would train"):
        order("vae", shared=True)
    folder = Path(__file__).parents[2] / "scripts" / "trained" / "unet"
    shop = Workshop(work, "cpu", folder)
    for model, file in ((small_vae(shop), "vae/diffusion_pytorch_model"), (text_encoder(shop), "text_encoder/model")):
        stored = _unprefixed(load_file(folder / f"{file}.safetensors"))
        found = _unprefixed(model.state_dict())
        assert {n for n, t in found.items() if not torch.equal(t, stored[n].float())} == set()
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert encoder(shop)(shop.pictures(drawn(2))).shape == (2, 4, 16, 16)
    assert shop.tokens(["a cat on blue"]).max() < text_encoder(shop).config.vocab_size
