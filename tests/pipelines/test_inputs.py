"""Requests to a pipeline: prompts, pictures, class labels or nothing, from Python, files and options."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from scipy.io import wavfile
from toy_pipelines import TOYS, every

import bitpolicy
from bitpolicy.cli.options import CallOptions
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.named import parse_formats
from bitpolicy.pipelines.loading import source_of
from bitpolicy.pipelines.prompting import default_requests, load_requests
from bitpolicy.policies.target import Target
from bitpolicy.sensitivity.cost.progress import Stages
from bitpolicy.sensitivity.inventory import inventory
from bitpolicy.sensitivity.probes.measurement import References
from bitpolicy.sensitivity.probes.run import ProbeRun, ProbeSettings
from bitpolicy.sensitivity.samples import Sample, fingerprint
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories
from bitpolicy.settings import Settings
from bitpolicy.workflow.plan import make_plan

NEED_A_PICTURE = [name for name, toy in TOYS.items() if toy.extra]


def new_trajectories(name: str, **call: Any) -> Trajectories:
    toy = TOYS[name]
    pipe = toy.new()
    return Trajectories(pipe, Target.chosen(pipe).names, {**toy.call, "num_inference_steps": 2, **call})


def picture(path: Path, colour: str, size: int = 16) -> Path:
    image = Image.new("RGB", (size, size), colour)
    image.putpixel((3, 5), (9, 200, 30))
    path.parent.mkdir(exist_ok=True)
    image.save(path)
    return path


@pytest.fixture
def lines(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file of JSON lines. Strings are written unchanged."""

    def write(*found: Any) -> Path:
        path = tmp_path / "asked" / "requests.jsonl"
        path.parent.mkdir(exist_ok=True)
        texts = [one if isinstance(one, str) else json.dumps(one) for one in found]
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
        return path

    return write


# Files of JSON lines


def test_each_line_is_a_request_with_paths_relative_to_the_file(lines: Callable[..., Path], tmp_path: Path) -> None:
    elsewhere = str(tmp_path / "far" / "b.png")
    path = lines(
        {"prompt": "a café ☕", "image": "a.png", "strength": 0.5},
        {"prompt": "b", "image": elsewhere},
        "",
        {"prompt": "c", "image": "https://example.com/c.png"},
        {"prompt": "d", "control_image": ["a.png", elsewhere], "mask_image": "deep/m.png"},
        {"prompt": "e", "video": ["0.png", "1.png"], "negative_prompt": "blurry.png"},
        {"strength": 0.5, "image": "a.png", "prompt": "a café ☕"},
    )
    asked = path.parent
    assert load_requests(path) == [
        {"prompt": "a café ☕", "image": str(asked / "a.png"), "strength": 0.5},
        {"prompt": "b", "image": elsewhere},
        {"prompt": "c", "image": "https://example.com/c.png"},
        {"prompt": "d", "control_image": [str(asked / "a.png"), elsewhere], "mask_image": str(asked / "deep/m.png")},
        {"prompt": "e", "video": [str(asked / "0.png"), str(asked / "1.png")], "negative_prompt": "blurry.png"},
    ]


@pytest.mark.parametrize("line", ["a red heart", "{'prompt': 'a cat'}", '{"prompt": "a cat"', '{"prompt": }'])
def test_a_line_that_is_not_json_is_named(lines: Callable[..., Path], line: str) -> None:
    with pytest.raises(BitPolicyError, match=r"^--prompts .*requests\.jsonl, line 3 is not JSON: "):
        load_requests(lines({"prompt": "a cat"}, "", line))


@pytest.mark.parametrize(
    ("line", "found"), [("[1, 2]", "list"), ('"a cat"', "str"), ("7", "int"), ("null", "NoneType"), ("true", "bool")]
)
def test_a_line_that_is_not_an_object_is_named(lines: Callable[..., Path], line: str, found: str) -> None:
    with pytest.raises(BitPolicyError, match=rf'line 2: expected an object such as {{"prompt": .*}}, found {found}$'):
        load_requests(lines({"prompt": "a cat"}, line))


@pytest.mark.parametrize("content", ["", "\n  \n"])
def test_a_file_without_lines_is_refused(lines: Callable[..., Path], content: str) -> None:
    with pytest.raises(BitPolicyError, match="has no prompt in it; write one"):
        load_requests(lines(content))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BitPolicyError, match=r"cannot read --prompts .*none\.jsonl: "):
        load_requests(tmp_path / "none.jsonl")


# Pictures


@pytest.mark.parametrize("name", NEED_A_PICTURE)
def test_a_picture_given_by_its_path_equals_the_picture_itself(lines: Callable[..., Path], name: str) -> None:
    path = lines({"prompt": "a red heart", "image": "p/red.png"}, {"prompt": "a red heart", "image": "p/blue.png"})
    pictures = [picture(path.parent / "p" / f"{colour}.png", colour) for colour in ("red", "blue")]
    trajectories, found = new_trajectories(name), []
    for request, one in zip(load_requests(path), pictures, strict=True):
        asked = {"prompt": "a red heart"} if TOYS[name].takes == "prompt" else {}
        with Image.open(one) as opened:
            given = {**asked, **trajectories.call, "image": opened.convert("RGB")}
            seeded = torch.Generator().manual_seed(3)
            expected = trajectories.pipe(**given, generator=seeded, output_type="latent")[0]
        found.append(next(trajectories.latents([Sample.of(request, 3)])))
        assert torch.equal(found[-1][None], expected)
    assert not torch.equal(*found)


@pytest.mark.parametrize("name", NEED_A_PICTURE)
def test_the_error_for_a_missing_picture_says_where_to_give_one(name: str) -> None:
    with pytest.raises(BitPolicyError, match=rf"^{name} refused the call: .* prompts FILE\.jsonl.*\"image\"") as error:
        bitpolicy.probe(TOYS[name].new(), call=new_trajectories(name).call, samples=1, vectors=1, quiet=True)
    assert "\n" not in str(error.value)


def test_a_tensor_is_read_from_a_file_whatever_the_argument(lines: Callable[..., Path]) -> None:
    path = lines({"hint": "h.npy", "image_embeds": "e.safetensors", "prompt": "of h.npy", "mask": ["m.png"]})
    tensors = torch.randn(2, 3), torch.randn(1, 5).bfloat16()
    np.save(path.parent / "h.npy", tensors[0].numpy())
    save_file({"any": tensors[1]}, path.parent / "e.safetensors")
    picture(path.parent / "m.png", "red")
    sample = Sample.of(load_requests(path)[0], 0)
    found = sample.call_arguments()
    assert sample.prompt == "of h.npy"
    assert torch.equal(found["hint"], tensors[0])
    assert torch.equal(found["image_embeds"], tensors[1])
    assert isinstance(found["mask"][0], Image.Image)


@pytest.mark.parametrize("name", ["t.npy", "t.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"no tensor at all"], ids=["missing", "empty", "text"])
def test_a_tensor_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BitPolicyError, match=rf"^cannot read the tensor {tmp_path / name}: .*; give a "):
        Sample("", 0, {"hint": str(tmp_path / name)}).call_arguments()


def test_a_file_of_several_tensors_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "t.safetensors")
    with pytest.raises(BitPolicyError, match=r"t\.safetensors holds 2 tensors; give a file with one$"):
        Sample("", 0, {"hint": str(tmp_path / "t.safetensors")}).call_arguments()


@pytest.mark.parametrize("content", [None, b"", b"no picture at all"], ids=["missing", "empty", "text"])
def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "p.png"
    if content is not None:
        path.write_bytes(content)
    request = {"prompt": "a cat", "image": str(path)}
    with pytest.raises(BitPolicyError, match=rf"^cannot read the picture {path}: .*; give a path or URL of an image$"):
        Sample.of(request, 0).call_arguments()
    name = "StableDiffusionImg2ImgPipeline"
    with pytest.raises(BitPolicyError, match=f"^cannot read the picture {path}"):
        list(new_trajectories(name).latents([Sample.of(request, 0)]))
    with pytest.raises(BitPolicyError, match=f"^cannot read the picture {path}"):
        bitpolicy.probe(TOYS[name].new(), call=TOYS[name].call, prompts=[request], samples=1, quiet=True)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
def test_a_sound_is_read_from_a_wav_file(tmp_path: Path, dtype: str) -> None:
    expected = np.linspace(-0.9, 0.9, 50, dtype=np.float32)[:, None].repeat(2, 1)
    scaled = {"uint8": expected * 128 + 128, "int16": expected * 32768, "float32": expected}[dtype]
    wavfile.write(tmp_path / "hum.wav", 8000, scaled.astype(dtype))
    (tmp_path / "asked.jsonl").write_text('{"prompt": "a hum", "audio": "hum.wav", "audio_codes": "7 8"}')
    (request,) = load_requests(tmp_path / "asked.jsonl")
    given = Sample.of(request, 0).call_arguments()
    assert given["audio"].shape == (1, 2, 50)
    assert np.allclose(given["audio"][0].T, expected, atol=0.01)
    assert given["audio_codes"] == "7 8"
    (tmp_path / "hum.wav").write_bytes(b"no sound at all")
    with pytest.raises(BitPolicyError, match=r"^cannot read the sound .*hum\.wav: .*; give a WAV file$"):
        Sample.of(request, 0).call_arguments()


def key_of(trajectories: Trajectories, sample: Sample, folder: Path) -> set[str]:
    """The names of the record folders that a probe of `sample` has made so far."""
    layers, formats = inventory(trajectories.target), parse_formats("int8")
    settings = ProbeSettings("adjoint", (sample,))
    ProbeRun(trajectories, layers, formats, torch.float16, "weights", settings, folder, Stages(quiet=True))
    return {path.name for path in folder.iterdir()}


def test_another_picture_under_the_same_name_is_another_sample(tmp_path: Path) -> None:
    path, records = picture(tmp_path / "p.png", "red"), tmp_path / "records"
    sample = Sample.of({"prompt": "a cat", "image": str(path)}, 0)
    trajectories, before = new_trajectories("StableDiffusionImg2ImgPipeline"), sample.identity()
    (key,) = key_of(trajectories, sample, records)
    picture(path, "red")
    assert sample.identity() == before
    assert key_of(trajectories, sample, records) == {key}
    picture(path, "blue")
    assert sample.identity() != before
    assert len(key_of(trajectories, sample, records)) == 2


def test_the_same_picture_under_another_name_is_the_same_sample(tmp_path: Path) -> None:
    first, second = (picture(tmp_path / name, "red") for name in ("a.png", "b.png"))
    with Image.open(first) as opened:
        pictures = (str(first), str(second), opened.convert("RGB"))
    found = [Sample.of({"prompt": "a", "image": one}, 0).identity() for one in pictures]
    assert found[0] == found[1] == found[2]
    json.dumps(found)


def two_unlike() -> dict[str, tuple[Any, Any]]:
    """Call arguments that differ, but would look equal if only part of them were compared."""
    tensor, array = torch.zeros(100, 100), np.zeros((4, 6), np.float32)
    middle = tensor.clone()
    middle[50, 50] = 1
    wide, high = Image.new("L", (8, 2)), Image.new("L", (2, 8))
    return {
        "the middle of a large tensor": (tensor, middle),
        "the last digits of a tensor": (torch.tensor([1.0]), torch.tensor([1.0 + 1e-6])),
        "the dtype of a tensor": (torch.zeros(2), torch.zeros(2, dtype=torch.int64)),
        "the shape of an array": (array, array.reshape(6, 4)),
        "the size of a picture": (wide, high),
        "the mode of a picture": (Image.new("L", (6, 2)), Image.new("RGB", (2, 2))),
        "the way an array is read": (array[:, ::2], np.arange(12, dtype=np.float32).reshape(4, 3)[::-1]),
        "an array of texts": (np.array(["a", "b"]), np.array(["a", "c"])),
        "an item of a list": ([wide, wide], [wide, high]),
        "a number": (0.5, 0.25),
    }


@pytest.mark.parametrize("case", two_unlike())
def test_arguments_that_differ_have_different_identities(case: str) -> None:
    first, second = two_unlike()[case]
    assert Sample("a", 0, {"x": first}).identity() == Sample("a", 0, {"x": first}).identity()
    assert Sample("a", 0, {"x": first}).identity() != Sample("a", 0, {"x": second}).identity()
    assert fingerprint({"call": first}) != fingerprint({"call": second})
    json.dumps(fingerprint([first, second]))


# Class labels


@pytest.fixture
def dit() -> Any:
    """DiT with names for two of its thousand classes, in ImageNet's style."""
    pipe: Any = TOYS["DiTPipeline"].new()
    kind = type(pipe)
    named = kind(pipe.transformer, pipe.vae, pipe.scheduler, id2label={207: "golden retriever", 3: "tiger shark, Cod"})
    named.set_progress_bar_config(disable=True)
    return named


@pytest.mark.parametrize(("written", "label"), [("207", 207), ("golden retriever", 207), ("Cod", 3), ("0", 0)])
def test_a_class_is_given_by_number_or_by_name(dit: Any, written: str, label: int) -> None:
    trajectories = Trajectories(dit, ["transformer"], {"num_inference_steps": 2})
    seeded = torch.Generator().manual_seed(5)
    expected = dit(class_labels=[label], num_inference_steps=2, generator=seeded, output_type="pt").images
    if not isinstance(expected, torch.Tensor):  # DiT of diffusers 0.40 does not know "pt"
        expected = torch.from_numpy(expected).permute(0, 3, 1, 2)
    ((image, _),) = trajectories.images([Sample(written, 5)])
    assert torch.equal(image[None], expected)


@pytest.mark.parametrize("written", ["poodle", "-1", "1.5", "", "1001", "99999"])
def test_an_unknown_class_is_refused(dit: Any, written: str) -> None:
    with pytest.raises(BitPolicyError, match="DiTPipeline") as error:
        bitpolicy.probe(dit, call={"num_inference_steps": 2}, prompts=[written], samples=1, vectors=1, quiet=True)
    assert written in str(error.value)
    assert "\n" not in str(error.value)


def test_a_class_can_be_given_in_a_file_of_json_lines(dit: Any, lines: Callable[..., Path]) -> None:
    requests = load_requests(lines({"prompt": 207, "guidance_scale": 2.0}, {"prompt": "Cod"}))
    trajectories = Trajectories(dit, ["transformer"], {"num_inference_steps": 2})
    found = list(trajectories.latents([Sample.of(request, 0) for request in requests]))
    plain = list(trajectories.latents([Sample("207", 0), Sample("3", 0)]))
    assert not torch.equal(found[0], plain[0])
    assert torch.equal(found[1], plain[1])


# Default requests


@pytest.mark.parametrize("name", every(TOYS))
def test_default_requests_suit_the_kind_of_pipeline(name: str) -> None:
    toy = TOYS[name]
    pipe = toy.new()
    found = default_requests(pipe, bundled=False)
    assert len(set(map(str, found))) == len(found)
    if toy.takes == "nothing":
        assert found == [""]
    else:
        assert len(found) >= 32
    if toy.takes == "class_labels":
        labels = [int(str(label)) for label in found]
        assert (min(labels), max(labels) < 1000) == (0, True)  # class 1000 is DiT's null class
        assert max(labels) > 900
    if not toy.extra:
        call = {**toy.call, "num_inference_steps": 1}
        table = bitpolicy.probe(pipe, call=call, samples=2, vectors=1, formats="int8", quiet=True)
        assert torch.isfinite(table.error).all()


# Arguments of the call


def test_an_argument_that_the_pipeline_does_not_take_is_refused_in_calls_and_requests() -> None:
    pipe = TOYS["StableDiffusionPipeline"].new()
    with pytest.raises(BitPolicyError, match=r"^StableDiffusionPipeline does not take heigth; leave it out$"):
        bitpolicy.probe(pipe, call={"heigth": 16}, quiet=True)
    with pytest.raises(BitPolicyError, match=r"^StableDiffusionPipeline does not take image, strength; leave it out$"):
        bitpolicy.probe(pipe, prompts=[{"prompt": "a", "image": "a.png", "strength": 1}], quiet=True)
    with pytest.raises(BitPolicyError, match=r"^DDIMPipeline does not take guidance_scale; leave it out$"):
        bitpolicy.search(TOYS["DDIMPipeline"].new(), "50%", call={"guidance_scale": 3.0}, quiet=True)


@pytest.mark.parametrize("place", range(9))
def test_every_request_is_checked_before_work_begins(place: int) -> None:
    """Some of the nine prompts are for the probe, some for the search, and some are held out."""
    requests: list[Any] = [{"prompt": f"prompt {i}"} for i in range(9)]
    requests[place]["heigth"] = 16
    settings = Settings("50%", prompts=tuple(requests))
    with pytest.raises(BitPolicyError, match="does not take heigth"):
        make_plan(settings, source_of(TOYS["StableDiffusionPipeline"].new()))


OURS = [
    ("StableDiffusionPipeline", "generator"),
    ("StableDiffusionPipeline", "output_type"),
    ("StableDiffusionPipeline", "num_images_per_prompt"),
    ("StableDiffusionPipeline", "latents"),
    ("StableDiffusionPipeline", "return_dict"),
    ("WanPipeline", "num_videos_per_prompt"),
    ("StableVideoDiffusionPipeline", "num_videos_per_prompt"),
    ("DDIMPipeline", "batch_size"),
    ("DiTPipeline", "class_labels"),
]


@pytest.mark.parametrize(("name", "argument"), OURS)
def test_an_argument_that_every_sample_sets_is_refused(name: str, argument: str) -> None:
    refused = f"^{argument} cannot be given: every sample sets its own; leave it out$"
    with pytest.raises(BitPolicyError, match=refused):
        bitpolicy.probe(TOYS[name].new(), call={**TOYS[name].call, argument: 1}, quiet=True)
    with pytest.raises(BitPolicyError, match=refused):
        bitpolicy.probe(TOYS[name].new(), call=TOYS[name].call, prompts=[{"prompt": "0", argument: 1}], quiet=True)


def test_a_prompt_for_all_samples_is_refused() -> None:
    with pytest.raises(BitPolicyError, match=r"^prompt cannot be given"):
        bitpolicy.probe(TOYS["FluxPipeline"].new(), call={"prompt": "a cat"}, quiet=True)


def test_the_error_for_a_refused_value_quotes_the_pipeline() -> None:
    name = "StableDiffusionPipeline"
    with pytest.raises(BitPolicyError, match=f"^{name} refused the call: .*divisible by 8 but are 17 and 16"):
        bitpolicy.probe(TOYS[name].new(), call={**TOYS[name].call, "height": 17}, samples=1, quiet=True)


@pytest.mark.parametrize("name", ["DiTPipeline", "StableDiffusionPipeline"])
def test_a_request_may_set_its_own_number_of_steps(name: str) -> None:
    """If the loop is left after a number of steps, that number has to be the sample's own."""
    trajectories = new_trajectories(name)
    short, long = (Sample("3", 1, {"num_inference_steps": steps}) for steps in (1, 4))
    plain = Sample("3", 1)
    for sample in (short, long, plain, short, plain):
        with_graph = trajectories.differentiable_signal(sample).detach()[0]
        torch.testing.assert_close(with_graph, next(trajectories.latents([sample])), rtol=1e-3, atol=1e-4)
    for sample in (long, plain, short, plain):  # the previous run was of another sample
        next(trajectories.latents([short if sample is plain else long]))
        with_graph = trajectories.differentiable_signal(sample).detach()[0]
        torch.testing.assert_close(with_graph, next(trajectories.latents([sample])), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("probe", ["adjoint", "stepwise"])
@pytest.mark.parametrize("name", ["DiTPipeline", "StableDiffusionPipeline"])
def test_requests_with_different_numbers_of_steps_are_probed_together(
    name: str, probe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = [{"prompt": "3", "num_inference_steps": 1}, {"prompt": "7"}]
    call = {**TOYS[name].call, "num_inference_steps": 4}
    arguments = {"samples": 3, "vectors": 1, "formats": "int8", "probe": probe, "quiet": True}
    table = bitpolicy.probe(TOYS[name].new(), call=call, prompts=requests, **arguments)
    assert table.probe == probe
    assert torch.isfinite(table.error).all()
    assert table.error.sum() > 0
    assert capsys.readouterr().err == ""


def test_requests_of_several_sizes_cannot_be_measured() -> None:
    trajectories = new_trajectories("StableDiffusionPipeline")
    samples = [Sample("a cat", 1, {"height": height}) for height in (16, 32)]
    with pytest.raises(BitPolicyError, match=r"\(4, 8, 8\), \(4, 16, 8\).*one size; .*--remeasure 0"):
        References.of(trajectories, samples, images=True)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline", "WanPipeline"])
def test_a_request_with_its_own_arguments_equals_a_call_with_them(name: str) -> None:
    trajectories = new_trajectories(name)
    sample = Sample.of({"prompt": "a cat", "negative_prompt": "blurry", "guidance_scale": 5.0}, 4)
    given = {**trajectories.call, "negative_prompt": "blurry", "guidance_scale": 5.0}
    seeded = torch.Generator().manual_seed(4)
    expected = trajectories.pipe("a cat", **given, generator=seeded, output_type="latent")[0]
    assert torch.equal(next(trajectories.latents([sample]))[None], expected)
    beside = [replace(sample, arguments={}), sample, replace(sample, arguments={})]
    found = list(trajectories.latents(beside))
    assert torch.equal(found[1][None], expected)
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


class WithSystemPrompt(StableDiffusionPipeline):
    """Takes a list of prompts and one text to put before each of them, as Lumina 2 and LTX 2 do."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: list[str],
        generator: Any = None,
        num_inference_steps: int = 2,
        system_prompt: str | None = None,
        negative_prompt: list[str] | None = None,
        output_type: str = "pt",
    ) -> Any:
        prompts = [system_prompt + one for one in prompt] if system_prompt else prompt
        given = {"negative_prompt": negative_prompt, "num_inference_steps": num_inference_steps}
        undecorated = inspect.unwrap(StableDiffusionPipeline.__call__)
        return undecorated(self, prompts, 16, 16, generator=generator, output_type=output_type, **given)


@pytest.mark.parametrize("count", [1, 2])
def test_texts_per_sample_become_lists_and_a_common_text_stays_single(count: int) -> None:
    pipe = WithSystemPrompt(**TOYS["StableDiffusionPipeline"].new().components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    trajectories = Trajectories(pipe, ["unet"], {"system_prompt": "Draw ", "negative_prompt": "blurry"})
    samples = [Sample("a cat", 1), Sample("a dog", 2)][:count]
    seeded = [torch.Generator().manual_seed(sample.seed) for sample in samples]
    prompts = [f"Draw {sample.prompt}" for sample in samples]
    expected = pipe(prompts, seeded, negative_prompt=["blurry"] * count, output_type="latent").images
    assert torch.equal(torch.stack(list(trajectories.latents(samples))), expected)


# Options of the command line


def pipeline_call(steps: int | None, guidance: float | None, others: list[str] | None = None) -> dict[str, Any]:
    return CallOptions(num_inference_steps=steps, guidance_scale=guidance, call=others).arguments


def test_call_options_are_read_as_json_if_possible_and_else_as_text() -> None:
    others = ["height=512", "eta=0.5", "negative_prompt=blurry, dark", "use_resolution_binning=false", "sizes=[1, 2]"]
    others += ["formula=a=b", "empty=", "nothing=null", 'quoted="7"']
    assert pipeline_call(20, 3.5, others) == {
        "num_inference_steps": 20,
        "guidance_scale": 3.5,
        "height": 512,
        "eta": 0.5,
        "negative_prompt": "blurry, dark",
        "use_resolution_binning": False,
        "sizes": [1, 2],
        "formula": "a=b",
        "empty": "",
        "nothing": None,
        "quoted": "7",
    }


def test_arguments_that_are_not_given_are_left_to_the_pipeline() -> None:
    assert pipeline_call(None, None) == {}
    assert pipeline_call(None, None, []) == {}
    assert pipeline_call(None, 0.0) == {"guidance_scale": 0.0}


def test_the_last_of_several_values_counts() -> None:
    assert pipeline_call(20, None, ["height=8", "height=16", "num_inference_steps=3"]) == {
        "height": 16,
        "num_inference_steps": 3,
    }


@pytest.mark.parametrize("text", ["height", "=512", "he ight=5", "--height=5", "1st=2", ""])
def test_a_call_option_without_name_or_value_is_refused(text: str) -> None:
    with pytest.raises(BitPolicyError, match=f"^--call '{text}' is not NAME=VALUE; write for example --call height=51"):
        pipeline_call(None, None, [text])


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_a_number_that_is_not_finite_is_refused(value: str) -> None:
    with pytest.raises(BitPolicyError, match=r"^eta is .*; give a number$"):
        pipeline_call(None, None, [f"eta={value}"])
    with pytest.raises(BitPolicyError, match=r"^guidance_scale is .*; give a number$"):
        pipeline_call(None, float(value.replace("Infinity", "inf")))


def test_a_call_option_reaches_the_pipeline() -> None:
    name = "FluxPipeline"
    given = pipeline_call(2, 3.0, ["height=16", "width=32", "max_sequence_length=8"])
    trajectories = Trajectories(TOYS[name].new(), ["transformer"], given)
    ((image, _),) = trajectories.images([Sample("a cat", 0)])
    assert image.shape == (3, 16, 32)
