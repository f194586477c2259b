"""Refusals by the hub are reported with the reason and what to do. A push uploads the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi, constants, set_client_factory
from huggingface_hub import errors as hub_errors
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils._http import default_client_factory

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.pipelines import hub
from bitpolicy.pipelines.loading import load_source, open_parts

ANSWERS = {
    "gated": (403, "GatedRepo", "owner/name is gated: accept its terms on https://huggingface.co/owner/name"),
    "missing": (404, "RepoNotFound", "neither a folder here nor a public model on the hub; check the name"),
    "no revision": (404, "RevisionNotFound", "owner/name has no revision 'v9'"),
    "down": (500, "", "cannot download owner/name"),
}

ASK = {
    "search": lambda: load_source("owner/name", revision="v9", device="cpu"),
    "export": lambda: open_parts("owner/name", ["unet"], torch.float16, "v9"),
}


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Online, as outside of tests, with an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.HF_HUB_OFFLINE", False, raising=False)


@pytest.fixture
def answered(online: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`answered(404, "RepoNotFound")`: every request to the hub gets this answer. An exception is raised instead."""

    def every_request(status: int | Exception, code: str = "") -> None:
        client = __import__(HTTPError.__module__)  # the HTTP library of this huggingface_hub

        def answer(request: Any) -> Any:
            if isinstance(status, Exception):
                raise status
            headers = {"X-Error-Code": code, "X-Error-Message": "said the hub"}
            return client.Response(status, headers=headers, request=request)

        set_client_factory(lambda: client.Client(transport=client.MockTransport(answer)))
        monkeypatch.setattr("time.sleep", lambda _: None)

    yield every_request
    set_client_factory(default_client_factory)


@pytest.mark.parametrize("what", ANSWERS)
@pytest.mark.parametrize("ask", ["search", "export"])
def test_the_answer_of_the_hub_is_reported(answered: Any, what: str, ask: str) -> None:
    status, code, needle = ANSWERS[what]
    answered(status, code)
    with pytest.raises(BitPolicyError) as raised:
        ASK[ask]()
    assert needle in str(raised.value)
    if what in ("gated", "missing"):
        assert "hf auth login" in str(raised.value)


def test_a_missing_network_is_reported(answered: Any) -> None:
    answered(__import__(HTTPError.__module__).ConnectError("no route to host"))
    with pytest.raises(BitPolicyError, match=r"owner/name is not in the cache, .*no route to host.*hf download"):
        load_source("owner/name", device="cpu")


def test_offline_mode_is_reported() -> None:
    """Tests run offline."""
    with pytest.raises(BitPolicyError, match=r"owner/name is not in the cache, and HF_HUB_OFFLINE is set; unset it"):
        load_source("owner/name", device="cpu")


# Pushing


@pytest.fixture
def logged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "get_token", lambda: "hf_token")


@pytest.fixture
def pushed(logged_in: None, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls to HfApi."""
    asked: list[Any] = []
    monkeypatch.setattr(HfApi, "create_repo", lambda _, repo, **how: asked.append((repo, how)) or f"https://hub/{repo}")
    monkeypatch.setattr(HfApi, "upload_folder", lambda _, **how: asked.append(how))
    return asked


def refused(status: int) -> Exception:
    client = __import__(HTTPError.__module__)
    request = client.Request("POST", "https://huggingface.co/api/repos/create")
    return hub_errors.HfHubHTTPError("Forbidden", response=client.Response(status, request=request))


def test_an_export_is_pushed(pushed: list[Any], command: Any, finished: Any, toy: Path, here: Path) -> None:
    policy = finished.folder / "policy.yaml"
    arguments = ("--policy", policy, "--model", toy, "--output-dir", "out", "--push-to-hub", "me/toy")
    outcome = command("export", *arguments)
    assert (outcome.code, outcome.err) == (0, "")
    assert "pushed to https://huggingface.co/me/toy" in outcome.out
    (repo, how), upload = pushed
    assert (repo, how) == ("me/toy", {"repo_type": "model", "exist_ok": True})
    assert (upload["repo_id"], upload["folder_path"]) == ("me/toy", Path("out"))
    assert 'DiffusionPipeline.from_pretrained("me/toy")' in (here / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("error", "needle"),
    [
        (refused(401), "token is missing or not valid: log in"),
        (refused(403), "token has no write access"),
        (hub_errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
        (ConnectionError("no route to host"), "hub cannot be reached (no route to host)"),
        (OSError("disk trouble"), "disk trouble"),
    ],
    ids=["no login", "forbidden", "offline", "no network", "another"],
)
def test_a_push_that_fails_says_why_and_keeps_the_folder(
    pushed: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, needle: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(HfApi, "upload_folder", fail)
    with pytest.raises(BitPolicyError) as raised:
        hub.push(tmp_path, "me/toy")
    assert needle in str(raised.value)
    assert f"`hf upload me/toy {tmp_path}`" in str(raised.value)


@pytest.mark.parametrize(("repo", "needle"), [("me/toy", "log in with"), ("a/b/c", "write OWNER/NAME")])
def test_a_push_that_cannot_succeed_is_refused_before_the_work(
    command: Any, finished: Any, toy: Path, here: Path, monkeypatch: pytest.MonkeyPatch, repo: str, needle: str
) -> None:
    monkeypatch.setattr(hub, "get_token", lambda: None)
    arguments = ("--policy", finished.folder / "policy.yaml", "--model", toy, "--output-dir", "out")
    command("export", *arguments, "--push-to-hub", repo).assert_refused("bitpolicy", repo, needle)
    assert not (here / "out").exists()


def test_an_export_takes_a_shard_size(command: Any, finished: Any, toy: Path, here: Path) -> None:
    arguments = ("--policy", finished.folder / "policy.yaml", "--model", toy, "--output-dir")
    assert command("export", *arguments, "out", "--max-shard-size", "50kB").code == 0
    assert len(list((here / "out" / "unet").glob("*.safetensors"))) > 2
    for size in ("50%", "0GB", "many"):
        command("export", *arguments, "other", "--max-shard-size", size).assert_refused("bitpolicy", size)
    policy = yaml.safe_load((here / "out" / "policy.yaml").read_text())
    assert policy["model"]["id"] == str(toy)
