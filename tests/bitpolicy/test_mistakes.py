"""Every mistake of a user: exit code 2, one line that says what to do, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableCascadePriorPipeline

from bitpolicy.policies.storage.folder_lock import working_in

Small = tuple[str, ...]


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def refused(command: Any, small: Small, here: Path) -> Callable[..., None]:
    """`refused(needles, *arguments)`: such a search is refused with these words and leaves the folder unchanged."""

    def check(needles: str | tuple[str, ...], *arguments: str) -> None:
        before = names(here)
        budget = () if "--budget" in arguments else ("--budget", "50%")
        outcome = command(*budget, *small, *arguments)
        outcome.assert_refused("search-policy", *([needles] if isinstance(needles, str) else needles))
        assert names(here) == before

    return check


# The budget


@pytest.mark.parametrize("budget", ["three", "5.5", "-5MB", "0", "0MB", "0%", "3Gb", "nan%"])
def test_a_meaningless_budget(refused: Any, budget: str) -> None:
    refused("write", "--budget", budget)


def test_a_budget_in_an_unknown_unit(refused: Any) -> None:
    refused("write", "--budget", "3iB")


def test_a_budget_below_the_smallest_policy_names_it(refused: Any) -> None:
    refused(("10%", "below the smallest policy with int4, int8, fp16", " bytes (", "raise --budget"), "--budget", "10%")


def test_the_smallest_policy_depends_on_the_formats(refused: Any) -> None:
    refused("below the smallest policy with int8, fp16", "--budget", "40%", "--formats", "int8")


# The model


def test_a_missing_folder(refused: Any) -> None:
    refused(("./nothing", "no such folder"), "--model", "./nothing")
    refused(("nothing", "no such folder"), "--model", "nothing")


def test_a_budget_that_another_program_cannot_meet(refused: Any) -> None:
    needles = ("below the smallest policy that ComfyUI can hold", "ComfyUI cannot pack", "layers", "leave out --target")
    refused(needles, "--budget", "45%", "--target", "comfy")


def test_a_hub_id_without_a_network(refused: Any) -> None:
    refused(("no-one/nothing is not in the cache", "HF_HUB_OFFLINE", "local folder"), "--model", "no-one/nothing")


def test_a_file(refused: Any, prompts: Path) -> None:
    refused(("prompts.txt", "safetensors", "pipeline folder"), "--model", str(prompts))


def test_a_missing_path(refused: Any) -> None:
    refused(("./nowhere", "no such folder or file", "hub id"), "--model", "./nowhere")


def test_a_folder_without_a_pipeline(refused: Any, toy: Path, here: Path) -> None:
    refused("no model_index.json", "--model", str(toy / "unet"))
    (here / "empty").mkdir()
    refused("empty or missing", "--model", "empty")


def test_a_checkpoint_that_is_already_packed(refused: Any, finished: Any) -> None:
    refused(("already quantized", "full-precision"), "--model", str(finished.folder / "checkpoint"))


def test_a_pipeline_whose_denoiser_has_another_name(refused: Any, half_pipeline: Callable[[], Any], here: Path) -> None:
    """Stable Cascade's prior. A model that takes a timestep is found under any name; this pipeline's text encoder does
    not fit."""
    pipe = half_pipeline()
    cascade = StableCascadePriorPipeline(pipe.tokenizer, pipe.text_encoder, pipe.unet, pipe.scheduler)
    cascade.save_pretrained(here / "cascade")
    refused("StableCascadePriorPipeline refused the call", "--model", "cascade")
    needles = ("has no component 'unet'", "text_encoder, prior", "--component")
    refused(needles, "--model", "cascade", "--component", "unet")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def pointer(path: Path) -> None:
    """What git leaves if git-lfs is not installed."""
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 401288\n")


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
DAMAGE = [
    pytest.param("model_index.json", lambda path: path.write_text("{"), id="an index that is not JSON"),
    pytest.param("model_index.json", lambda path: path.write_text("{}"), id="an index without a class"),
    pytest.param("model_index.json", lambda path: path.write_text("[]"), id="an index that is a list"),
    pytest.param(
        "model_index.json",
        lambda path: path.write_text(path.read_text().replace("StableDiffusionPipeline", "NoSuchPipeline")),
        id="a pipeline that diffusers does not have",
    ),
    pytest.param("unet/config.json", lambda path: path.write_text("{"), id="a config that is not JSON"),
    pytest.param("unet/config.json", lambda path: path.unlink(), id="no config"),
    pytest.param(WEIGHTS, lambda path: path.unlink(), id="no weights"),
    pytest.param(WEIGHTS, truncated, id="weights cut short"),
    pytest.param(WEIGHTS, pointer, id="a git-lfs pointer"),
    pytest.param("vae/diffusion_pytorch_model.safetensors", truncated, id="a VAE cut short"),
    pytest.param("text_encoder/model.safetensors", pointer, id="a text encoder that is a git-lfs pointer"),
]


@pytest.mark.parametrize(("file", "damage"), DAMAGE)
def test_a_damaged_model(refused: Any, toy: Path, here: Path, file: str, damage: Callable[[Path], None]) -> None:
    shutil.copytree(toy, here / "damaged")
    damage(here / "damaged" / file)
    refused((), "--model", "damaged")


def test_a_model_without_weights_is_one_line_in_a_process_too(process: Any, toy: Path, here: Path) -> None:
    shutil.copytree(toy, here / "damaged")
    (here / "damaged" / WEIGHTS).unlink()
    process("--budget", "50%", "--model", "damaged").assert_refused("search-policy")


# Names


@pytest.mark.parametrize(
    ("option", "value", "needles"),
    [
        ("--formats", "int9", ("'int9'", "int2 to int8", "nf4, fp8, fp16; or all")),
        ("--formats", "int4,,int9", ("'int9'",)),
        ("--formats", ",", ("--formats int4,int8,fp16",)),
        ("--component", "decoder", ("'decoder'", "vae, text_encoder, unet")),
        ("--component", "scheduler", ("'scheduler'",)),
        ("--device", "tpu", ("'tpu'", "auto, cpu or cuda")),
        ("--dtype", "int8", ("'int8'", "auto, float16, bfloat16, float32")),
        ("--probe", "magic", ("'magic'", "adjoint, stepwise, ablation, weight, prior")),
        ("--compute", "int2", ("'int2'", "exact, int8, fp8, mxfp8, nvfp4")),
        ("--variant", "fp16", ("variant=fp16",)),
    ],
)
def test_an_unknown_name_is_refused_with_the_known_ones(
    refused: Any, option: str, value: str, needles: tuple[str, ...]
) -> None:
    refused(needles, option, value)


def test_cuda_without_a_cuda_device(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused(("--device cuda", "use --device cpu or auto"), "--device", "cuda")


def test_a_probe_that_does_not_see_a_component(refused: Any) -> None:
    refused(("text_encoder, vae", "--probe adjoint"), "--component", "unet,text_encoder,vae", "--probe", "stepwise")


def test_a_storage_that_optuna_does_not_know(refused: Any) -> None:
    refused(("'nowhere'", "sqlite:///"), "--storage", "nowhere", "--probe", "weight")


@pytest.mark.parametrize(
    ("arguments", "needles"),
    [
        (("--trials", "-1"), ("--trials",)),
        (("--trials", "many"), ("--trials",)),
        (("--num-inference-steps", "0"), ("--num-inference-steps",)),
        (("--num-inference-steps", "100000"), ("num_inference_steps is 100,000", "DDIMScheduler", "1,000 timesteps")),
        (("--seed", "-1"), ("--seed",)),
        (("--seed", str(2**31)), ("--seed is 2147483648", "from 0 to 2147483647")),
        (("--seed", str(2**64)), ("--seed is 18446744073709551616", "from 0 to 2147483647")),
        (("--no-such-option",), ("--no-such-option",)),
        (("--model",), ("--model", "argument")),
    ],
)
def test_meaningless_options(refused: Any, arguments: tuple[str, ...], needles: tuple[str, ...]) -> None:
    refused(needles, *arguments)


@pytest.mark.parametrize(
    ("option", "value", "needles"),
    [
        ("--target-psnr", "nan", ("nan", "dB above 0, at most 150")),
        ("--target-psnr", "-1", ("-1", "dB above 0")),
        ("--target-psnr", "1000", ("1000", "at most 150")),
        ("--target-lpips", "-1", ("-1", "above 0")),
        ("--target-lpips", "inf", ("inf", "at most 1")),
    ],
)
def test_a_quality_that_no_image_has(
    command: Any, here: Path, option: str, value: str, needles: tuple[str, ...]
) -> None:
    """It is refused before a model is loaded."""
    outcome = command(option, value, "--model", "./not-looked-at")
    outcome.assert_refused("search-policy", option, *needles)
    assert list(here.iterdir()) == []


def test_a_quality_whose_network_is_missing_is_refused_before_the_work(command: Any, small: Small, here: Path) -> None:
    outcome = command("--target-lpips", "0.1", *small)
    outcome.assert_refused("search-policy", "--target-lpips cannot be measured", "--features")
    assert list(here.iterdir()) == []


def test_missing_networks(refused: Any) -> None:
    refused(("--features nowhere", "no such file or folder"), "--features", "nowhere")


@pytest.mark.parametrize("command_line", [("--budget", "50%"), ("probe",)])
@pytest.mark.parametrize("name", ["x" * 300, "x" * 250, "a/" + "y" * 300 + "/b"])
def test_a_name_that_no_file_can_have(
    command: Any, small: Small, here: Path, command_line: tuple[str, ...], name: str
) -> None:
    given = small[:-2] if command_line == ("probe",) else small
    outcome = command(*command_line, *given, "--output-dir", name)
    program = "bitpolicy" if command_line == ("probe",) else "search-policy"
    outcome.assert_refused(program, "cannot store", "characters", "a shorter one")
    assert list(here.iterdir()) == []


def test_no_budget(command: Any, here: Path) -> None:
    command("--seed", "0").assert_refused("search-policy", "asked for nothing", "--budget", "--target-psnr")


def test_an_unknown_command(command: Any, here: Path) -> None:
    command("serach").assert_refused("bitpolicy", "serach", "search")


# Prompts


def test_a_missing_file_of_prompts(refused: Any) -> None:
    refused(("--prompts nothing.txt", "No such file", "one prompt per line"), "--prompts", "nothing.txt")


def test_prompts_that_are_a_folder(refused: Any) -> None:
    refused("--prompts .", "--prompts", ".")


@pytest.mark.parametrize("content", [b"", b"\n \n\t\n"])
def test_prompts_without_a_prompt(refused: Any, here: Path, content: bytes) -> None:
    (here / "empty.txt").write_bytes(content)
    refused(("--prompts empty.txt", "no prompt in it"), "--prompts", "empty.txt")


def test_prompts_that_are_not_text(refused: Any, here: Path) -> None:
    (here / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    refused("--prompts image.png", "--prompts", "image.png")


# The output folder


def test_a_folder_with_something_else(refused: Any, here: Path) -> None:
    (here / "out").mkdir()
    (here / "out" / "thesis.tex").write_text("x")
    refused(("out holds something else (thesis.tex)", "--overwrite"), "--output-dir", "out")


def test_the_folder_of_the_model(refused: Any, toy: Path) -> None:
    before = names(toy)
    refused("holds something else", "--output-dir", str(toy))
    assert names(toy) == before


@pytest.mark.parametrize(
    ("option", "value", "changed"),
    [
        ("--budget", "51%", "budget"),
        ("--seed", "1", "seed"),
        ("--formats", "int8", "formats"),
        ("--num-inference-steps", "3", "call"),
        ("--probe", "weight", "probe"),
        ("--dtype", "float32", "dtype"),
    ],
)
def test_a_folder_of_a_search_with_other_settings_is_refused_with_what_differs(
    command: Any, finished: Any, option: str, value: str, changed: str
) -> None:
    result = (finished.folder / "result.json").read_bytes()
    outcome = command(*finished.arguments, option, value)
    outcome.assert_refused("search-policy", f" {changed}; choose another --output-dir", "--overwrite")
    assert (finished.folder / "result.json").read_bytes() == result


def test_a_folder_of_a_search_with_more_trials_keeps_them(command: Any, finished: Any) -> None:
    result = (finished.folder / "result.json").read_bytes()
    outcome = command(*finished.arguments, "--trials", "1")
    outcome.assert_refused("search-policy", "holds a search with 2 trials", "--overwrite")
    assert (finished.folder / "result.json").read_bytes() == result


def test_a_folder_with_a_run_json_of_something_else(refused: Any, here: Path) -> None:
    (here / "out").mkdir()
    (here / "out" / "run.json").write_text(json.dumps(["run", 1]))
    refused("holds something else", "--output-dir", "out")


def test_a_file_in_the_way(refused: Any, here: Path) -> None:
    (here / "out").write_text("x")
    refused("out holds something else", "--output-dir", "out")
    refused("cannot write to out", "--output-dir", "out", "--overwrite")
    refused("cannot write to out/below", "--output-dir", "out/below")
    assert (here / "out").read_text() == "x"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission(refused: Any, here: Path) -> None:
    (here / "locked").mkdir(mode=0o500)
    refused("cannot write to locked/out", "--output-dir", "locked/out")


@pytest.mark.parametrize("arguments", [("--budget", "50%"), ("probe",)])
def test_a_folder_that_another_process_is_using(
    command: Any, small: Small, here: Path, arguments: tuple[str, ...]
) -> None:
    """It is refused at once, before a model is loaded, and the owner's files stay."""
    reader, writer = os.pipe()
    owner = os.fork()
    if owner == 0:
        try:
            with working_in(here / "out"):
                os.write(writer, b"in it")
                signal.pause()
        finally:
            os._exit(0)
    try:
        os.read(reader, 5)
        given = small[:-2] if arguments == ("probe",) else small
        outcome = command(*arguments, *given, "--output-dir", "out")
        name = "bitpolicy" if arguments == ("probe",) else "search-policy"
        outcome.assert_refused(name, f"out is being written by process {owner}", "choose another --output-dir")
    finally:
        os.kill(owner, signal.SIGKILL)
        os.waitpid(owner, 0)
    assert [path.name for path in (here / "out").iterdir()] == [".bitpolicy-lock"]
    if arguments != ("probe",):
        assert command(*arguments, *small, "--output-dir", "out", "--probe", "weight", "--json").code == 0
        assert ".bitpolicy-lock" not in {path.name for path in (here / "out").iterdir()}


# Whose fault it is


def test_debug_shows_the_traceback_of_a_mistake(command: Any, small: Small, here: Path) -> None:
    from bitpolicy.search.budget import BudgetError

    with pytest.raises(BudgetError, match="not a size"):
        command("--budget", "three", *small, "--debug")


def test_a_bug_keeps_its_traceback(command: Any, small: Small, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("bitpolicy.cli.running.search.make_plan", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        command("--budget", "50%", *small)


def test_a_full_disk_is_one_line(command: Any, small: Small, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "out/policy.yaml")

    monkeypatch.setattr("bitpolicy.policies.policy.Policy.save", full)
    outcome = command("--budget", "99GB", *small, "--output-dir", "out", "--quiet", "--json")
    assert outcome.code == 2
    assert "search-policy: the disk is full (out/policy.yaml)" in outcome.err.splitlines()[-1]


def test_a_limit_on_the_size_of_a_file_is_one_line(process: Any, finished: Any, here: Path) -> None:
    """`ulimit -f` sets such a limit, and a memory stick has one. safetensors' own writer runs into it."""
    first = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    first += "import bitpolicy.cli.main; resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))"
    shutil.copytree(finished.folder / "work", here / "out" / "work")
    shutil.copy(finished.folder / "run.json", here / "out" / "run.json")
    outcome = process(*finished.arguments, "--output-dir", here / "out", first=first)
    assert outcome.code == 2, outcome.err[-2000:]
    assert "file of this size; fix that and run the same command again" in outcome.err.splitlines()[-1]
    assert "Traceback" not in outcome.err


# The objective


def test_an_objective_that_cannot_be_measured(refused: Any) -> None:
    """The network of LPIPS is not here, and the toy pipeline has none of its own."""
    refused(("--objective lpips cannot be measured", "--features"), "--objective", "lpips")
    refused("unknown objective 'psnr'; write any of mse, ssim, lpips", "--objective", "psnr")


def test_an_objective_without_a_study(command: Any, small: Small, refused: Any, here: Path) -> None:
    refused(("--objective ssim", "leave it out"), "--objective", "ssim", "--trials", "0")
    outcome = command("--target-psnr", "40", *small, "--objective", "ssim")
    outcome.assert_refused("search-policy", "--objective ssim", "--budget")


def test_another_objective_in_a_folder(command: Any, finished: Any, here: Path) -> None:
    shutil.copytree(finished.folder, here / "out")
    before = names(here)
    outcome = command(*finished.arguments, "--output-dir", str(here / "out"), "--objective", "ssim")
    outcome.assert_refused("search-policy", "a different objective", "--overwrite")
    assert names(here) == before
