"""push_to_hub, against a stand-in for the hub."""

from __future__ import annotations

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from tiny_trainer import one_line

from ppo_fast.exports.hub import check_repo, push_to_hub


class Hub:
    """Notes calls; raises ``error`` in place of uploading."""

    calls: list
    error: Exception | None = None

    def __init__(self, token=None):
        type(self).calls.append(("token", token))

    def create_repo(self, repo_id, *, private, exist_ok):
        self.calls.append(("create", repo_id, private, exist_ok))
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        if self.error is not None:
            raise self.error
        self.calls.append(("upload", repo_id, sorted(p.name for p in folder_path.iterdir())))


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(Hub, "calls", [], raising=False)
    monkeypatch.setattr(Hub, "error", None)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return Hub


@pytest.fixture
def folder(tmp_path):
    for name in ("config.json", "README.md"):
        (tmp_path / name).write_text("{}")
    return tmp_path


@pytest.mark.parametrize("private", [True, False])
def test_a_folder_is_uploaded_whole(hub, folder, private):
    options = {} if private else {"private": False, "token": "secret"}
    assert push_to_hub(folder, "org/name", **options) == "https://hub/org/name"
    assert hub.calls == [
        ("token", None if private else "secret"),
        ("create", "org/name", private, True),
        ("upload", "org/name", ["README.md", "config.json"]),
    ]


def test_nothing_is_sent_of_a_folder_without_a_model(hub, tmp_path):
    (tmp_path / "README.md").write_text("")
    with pytest.raises(FileNotFoundError, match=r"holds no saved model \(no config.json\)"):
        push_to_hub(tmp_path, "org/name")
    (tmp_path / "adapter_config.json").write_text("{}")
    push_to_hub(tmp_path, "org/name")
    assert [call[0] for call in hub.calls] == ["token", "create", "upload"]


@pytest.mark.parametrize("name", ["a b", "org/name/more", "", "-x/y", "name", "org/na--me"])
def test_bad_names_are_found_before_a_run(hub, folder, name):
    for check in (check_repo, lambda name: push_to_hub(folder, name)):
        with pytest.raises(ValueError, match=r"push_to_hub: got .*'owner/model'") as error:
            check(name)
        assert one_line(error)
    assert not hub.calls
    check_repo("org/name")


def answer(status):
    request = httpx.Request("POST", "https://hub")
    return HfHubHTTPError("no\nentry", response=httpx.Response(status, request=request))


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (LocalTokenNotFoundError("x"), "no token; run hf auth login, or set HF_TOKEN"),
        (OfflineModeIsEnabled("x"), "HF_HUB_OFFLINE is set"),
        (answer(401), r"no token that may write there \(HTTP 401\); run hf auth login"),
        (answer(500), "HfHubHTTPError: no entry"),
        (httpx.ConnectError("no\nroute"), r"cannot be reached \(ConnectError: no route\)"),
    ],
)
def test_a_failure_is_one_line_and_the_files_stay(hub, folder, error, why, monkeypatch):
    monkeypatch.setattr(Hub, "error", error)
    with pytest.raises(RuntimeError, match=f"push_to_hub: org/name: .*{why}.*; the files") as found:
        push_to_hub(folder, "org/name", token="secret")
    assert one_line(found)
    assert "secret" not in str(found.value)
    assert (folder / "config.json").exists()
