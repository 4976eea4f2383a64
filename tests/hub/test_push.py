"""What a push sends, and that it comes back: the real client against a Hub on loopback, in processes of its own."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError

from diffusers_ctx.adapter_format import AdapterError
from diffusers_ctx.hub import push_adapter_folder, render_model_card
from diffusers_ctx.hub.push import files_to_push

from .conftest import CONFIG, contents, write_adapter
from .hub_double import TOKEN, USER, HubDouble, Refusal, client_environment, run_client


REPO = f"{USER}/weather"
CREATE, PUSH, RESOLVE = "create_repository", "push_adapter_folder", "resolve_adapter_folder"
CALLS = """
import json, sys
from diffusers_ctx import hub
for name, arguments in json.loads(sys.argv[1]):
    try:
        value = getattr(hub, name)(**arguments)
        outcome = {"oid": value.oid, "pr_url": value.pr_url} if name.startswith("push") else {"path": str(value)}
    except Exception as error:
        outcome = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(outcome))
"""
ADAPTER_FILES = {
    "README.md",
    "context_adapter.safetensors",
    "context_adapter_config.json",
    "context_module/config.json",
    "context_module/diffusion_pytorch_model.safetensors",
    "pytorch_lora_weights.safetensors",
}


def call(hub: HubDouble, home: Path, *calls: tuple[str, dict[str, Any]], **variables: str) -> list[dict[str, Any]]:
    """Makes the calls one after the other in one new process and says how each came out."""
    home.mkdir(exist_ok=True)
    client = run_client(CALLS, json.dumps(calls, default=str), endpoint=hub.endpoint, hf_home=home, **variables)
    assert client.returncode == 0, client.stderr
    return [json.loads(line) for line in client.stdout.splitlines()]


def test_a_pushed_adapter_comes_back_byte_for_byte_and_then_offline(hub, adapter, tmp_path):
    for stray in (
        "checkpoint-10/optimizer.bin",
        "logs/events",
        "training_state.pt",
        "notes.png",
        "a grid 1.png",
        "context_module/x.bin",
    ):
        (adapter / stray).parent.mkdir(exist_ok=True)
        (adapter / stray).write_bytes(b"not for the Hub")
    (adapter / "a grid [1].png").write_bytes(b"\x89PNG of the grid")
    render_model_card(CONFIG, pictures=["a grid [1].png"]).save(adapter / "README.md")
    expected = {name: data for name, data in contents(adapter).items() if name in ADAPTER_FILES | {"a grid [1].png"}}

    (pushed,) = call(hub, tmp_path / "pusher", (PUSH, {"folder": adapter, "repo_id": REPO}), HF_TOKEN=TOKEN)
    commits = hub.repos[REPO].branches["main"]
    assert [commit.message for commit in commits] == ["initial commit", "Upload context adapter"]
    assert commits[-1].changed == sorted(expected)
    assert {name: data for name, data in commits[-1].files.items() if name != ".gitattributes"} == expected
    assert pushed == {"oid": commits[-1].oid, "pr_url": None}
    assert len(hub.sent("POST", "/api/validate-yaml")) >= 1
    assert {(request.host, request.token) for request in hub.requests} == {("127.0.0.1", TOKEN), ("localhost", None)}

    hub.requests.clear()
    home = tmp_path / "loader"
    (loaded,) = call(hub, home, (RESOLVE, {"name_or_path": REPO}))
    folder = Path(loaded["path"])
    assert folder.is_relative_to(home)
    assert contents(folder) == {name: data for name, data in expected.items() if name in ADAPTER_FILES}
    assert not hub.sent("GET", ".*grid.*")

    hub.stop()
    offline = [(RESOLVE, {"name_or_path": REPO, "local_files_only": only}) for only in (False, True)]
    assert call(hub, home, *offline) == [loaded, loaded]


def test_another_push_replaces_the_adapter_and_takes_a_stale_lora_away(hub, adapter, tmp_path):
    frozen = write_adapter(tmp_path / "new", mode="frozen")
    call(
        hub,
        tmp_path / "home",
        (PUSH, {"folder": adapter, "repo_id": REPO}),
        (PUSH, {"folder": frozen, "repo_id": REPO, "commit_message": "Second"}),
        HF_TOKEN=TOKEN,
    )
    _, first, second = hub.repos[REPO].branches["main"]
    assert set(first.files) == ADAPTER_FILES | {".gitattributes"}
    assert second.message == "Second"
    assert set(second.files) == set(first.files) - {"pytorch_lora_weights.safetensors"}
    assert json.loads(second.files["context_adapter_config.json"])["mode"] == "frozen"


def test_a_new_repository_can_be_private_and_take_the_owners_name(hub, adapter, tmp_path):
    pushed, stranger, friend = call(
        hub,
        tmp_path / "home",
        (PUSH, {"folder": adapter, "repo_id": "weather", "private": True, "token": TOKEN}),
        (RESOLVE, {"name_or_path": REPO}),
        (RESOLVE, {"name_or_path": REPO, "token": TOKEN}),
    )
    assert hub.repos[REPO].private and hub.repos[REPO].branches["main"][-1].oid == pushed["oid"]
    assert stranger["error"] == "AdapterError" and "hf auth login" in stranger["message"]
    assert contents(Path(friend["path"])) == contents(adapter)


def test_a_pull_request_leaves_the_main_branch_alone(hub, adapter, tmp_path):
    push = (PUSH, {"folder": adapter, "repo_id": REPO, "create_pr": True, "token": TOKEN})
    (pushed,) = call(hub, tmp_path / "home", push)
    branches = hub.repos[REPO].branches
    assert pushed["pr_url"] and len(branches["main"]) == 1
    assert set(branches["refs/pr/1"][-1].changed) == ADAPTER_FILES


def test_what_cannot_be_pushed_is_refused_before_anything_is_uploaded(hub, adapter, tmp_path):
    broken = write_adapter(tmp_path / "broken")
    weights = broken / "context_adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    no_token, no_adapter, bad_token = call(
        hub,
        tmp_path / "home",
        (PUSH, {"folder": adapter, "repo_id": REPO}),
        (PUSH, {"folder": broken, "repo_id": REPO, "token": TOKEN}),
        (PUSH, {"folder": adapter, "repo_id": REPO, "token": "hf_expired"}),
    )
    assert no_token["error"] == "LocalTokenNotFoundError"
    assert "hf auth login" in no_token["message"] and "--hub_token" in no_token["message"]
    assert no_adapter["error"] == "AdapterError" and str(weights) in no_adapter["message"]
    assert bad_token["error"] == "PermissionError"
    assert "hf auth login" in bad_token["message"] and "hf_expired" not in bad_token["message"]
    assert {request.token for request in hub.requests} == {"hf_expired"}  # the other two never reached the Hub
    assert hub.repos == hub.blobs == {}


def test_a_repository_can_be_made_before_there_is_anything_to_push(hub, adapter, tmp_path):
    made, again, no_token, bad_token, pushed = call(
        hub,
        tmp_path / "home",
        (CREATE, {"repo_id": "weather", "token": TOKEN}),
        (CREATE, {"repo_id": REPO, "token": TOKEN}),
        (CREATE, {"repo_id": "other"}),
        (CREATE, {"repo_id": "other", "token": "hf_expired"}),
        (PUSH, {"folder": adapter, "repo_id": REPO, "token": TOKEN}),
    )
    assert made == again == {"path": REPO}
    assert no_token["error"] == "LocalTokenNotFoundError" and bad_token["error"] == "PermissionError"
    assert list(hub.repos) == [REPO] and hub.repos[REPO].branches["main"][-1].oid == pushed["oid"]


def test_a_repository_that_can_only_be_read_is_refused_before_training(hub, tmp_path):
    hub.add_repo("stranger/weather", {"README.md": b"# theirs"})
    (refused,) = call(hub, tmp_path / "home", (CREATE, {"repo_id": "stranger/weather", "token": TOKEN}))
    assert refused["error"] == "PermissionError" and "write to stranger/weather" in refused["message"]


def test_a_hub_that_is_not_reached_is_one_clear_error(hub, adapter, tmp_path):
    hub.stop()
    calls = (PUSH, {"folder": adapter, "repo_id": REPO, "token": TOKEN}), (CREATE, {"repo_id": REPO, "token": TOKEN})
    for variables in ({}, {"HF_HUB_OFFLINE": "1"}):
        push, create = call(hub, tmp_path / "home", *calls, **variables)
        assert push["error"] == create["error"] == "ConnectionError"
        assert f"All is saved in {adapter}; complete the push with" in push["message"]
        assert f"Nothing was pushed to {REPO}; try again" in create["message"]


REFUSALS = {
    "weights": ("/lfs/.*", 413, "Error while uploading .*ConnectionError|413"),
    "commit": (".*/commit/main", 400, "400"),
    "token": (".*/commit/main", 403, None),
    "card": ("/api/validate-yaml", 400, "Invalid metadata in README.md"),
}


@pytest.mark.parametrize("refused", REFUSALS)
def test_a_push_that_breaks_off_names_the_command_that_completes_it(hub, adapter, tmp_path, monkeypatch, refused):
    path, status, reason = REFUSALS[refused]
    answer = hub.answer

    def refuse(request):
        if re.fullmatch(path, request.path):
            raise Refusal(status, "not now")
        return answer(request)

    folder = adapter.rename(tmp_path / "Ada's adapter")
    options = {"folder": folder, "repo_id": REPO, "private": True, "commit_message": "It's done"}
    with monkeypatch.context() as patched:
        patched.setattr(hub, "answer", refuse)
        (outcome,) = call(hub, tmp_path / "home", (PUSH, options), HF_TOKEN=TOKEN)
    assert outcome["error"] == ("PermissionError" if status == 403 else "ConnectionError")
    assert reason is None or re.search(reason, outcome["message"])
    message, command = outcome["message"].split("\n    ")
    assert message.endswith(f"All is saved in {folder}; complete the push with") and len(message) < 700
    assert len(hub.repos[REPO].branches["main"]) == 1

    environment = client_environment(hub.endpoint, tmp_path / "home", HF_TOKEN=TOKEN)
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    subprocess.run(command, shell=True, check=True, env=environment, cwd=tmp_path / "home", timeout=600)
    pushed = hub.repos[REPO].branches["main"][-1]
    assert pushed.message == "It's done" and pushed.changed == sorted(ADAPTER_FILES) and hub.repos[REPO].private


FAILURES = [TimeoutError("timed out"), RuntimeError("Error while uploading 'x' to the Hub."), HTTPError("reset")]


@pytest.mark.parametrize("error", FAILURES)
@pytest.mark.parametrize("method", ["create_repo", "upload_folder"])
def test_no_failure_of_the_network_is_bare(adapter, monkeypatch, method, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(HfApi, "create_repo", lambda *arguments, **options: SimpleNamespace(repo_id=REPO))
    monkeypatch.setattr(HfApi, method, fail)
    with pytest.raises(ConnectionError, match=r"failed \(.*\)\. All is saved in .*\n    python -c") as raised:
        push_adapter_folder(adapter, REPO, token=TOKEN)
    assert str(error) in str(raised.value) and TOKEN not in str(raised.value)


def test_an_adapter_of_mode_full_takes_its_pipeline_along(tmp_path):
    folder = write_adapter(tmp_path / "full", mode="full")
    with pytest.raises(AdapterError, match=r"model_index\.json.*save_pretrained"):
        files_to_push(folder)
    parts = {"unet": ["diffusers", "UNet2DConditionModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    index = {
        "_class_name": "StableDiffusionPipeline",
        "requires_safety_checker": False,
        "safety_checker": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index | parts))
    for name in (
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "tokenizer/vocab.json",
        "logs/events",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    pipeline = {"model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    expected = ADAPTER_FILES - {"pytorch_lora_weights.safetensors"} | pipeline | {"tokenizer/vocab.json"}
    assert sorted(files_to_push(folder)) == sorted(expected)


def test_the_card_must_be_there(adapter):
    (adapter / "README.md").unlink()
    with pytest.raises(AdapterError, match=r"README\.md.*render_model_card"):
        files_to_push(adapter)


RECORD = {"train_data_dir": "photos", "concepts": ["night", "snow"], "seed": 0, "hub_model_id": None, "rank": 4}


def test_the_options_of_the_training_run_go_along(hub, adapter, tmp_path):
    record = adapter / "training_config.json"
    record.write_text(json.dumps(RECORD))
    push = (PUSH, {"folder": adapter, "repo_id": REPO, "token": TOKEN})
    call(hub, tmp_path / "home", push)
    assert hub.repos[REPO].branches["main"][-1].files[record.name] == record.read_bytes()
    record.unlink()
    call(hub, tmp_path / "home", push)
    assert record.name not in hub.repos[REPO].branches["main"][-1].files  # another adapter, perhaps by hand


@pytest.mark.parametrize(
    "secret",
    [
        {"train_data_dir": "/home/ada/photos"},
        {"cache_dir": "C:\\Users\\ada"},
        {"hub_token": "secret"},
        {"validation_interventions": ["night", "hf_" + 20 * "x"]},
    ],
)
def test_options_that_hold_a_secret_stay_here(adapter, caplog, secret):
    (adapter / "training_config.json").write_text(json.dumps(RECORD | secret))
    assert set(files_to_push(adapter)) == ADAPTER_FILES
    assert "training_config.json is not pushed" in caplog.text


@pytest.mark.parametrize("target", ["gone.png", "../outside.png", "/etc/outside.png", "training_state.pt"])
def test_a_picture_of_the_card_must_be_one_in_the_folder(adapter, target):
    (adapter / "training_state.pt").write_bytes(b"")
    (adapter.parent / "outside.png").write_bytes(b"")
    card = adapter / "README.md"
    card.write_text(card.read_text() + f"\n![a picture]({target})\n")
    with pytest.raises(AdapterError, match="is no picture in"):
        files_to_push(adapter)


def test_pictures_elsewhere_on_the_web_are_not_files_to_push(adapter):
    card = adapter / "README.md"
    card.write_text(card.read_text() + "\n![badge](https://example.org/badge.png)\n")
    assert set(files_to_push(adapter)) == ADAPTER_FILES


def test_what_the_hub_does_not_have_is_one_clear_error_and_costs_no_weights(hub, adapter, tmp_path):
    hub.add_repo(REPO, contents(adapter))
    hub.add_repo("some/lora", {"README.md": b"", "pytorch_lora_weights.safetensors": b"many bytes"})
    newer = json.dumps(CONFIG | {"format_version": 99}).encode()
    hub.add_repo("some/newer", contents(adapter) | {"context_adapter_config.json": newer})
    cases = [
        ({"name_or_path": "ada/other"}, "neither a local folder nor a repository"),
        ({"name_or_path": REPO, "revision": "v9"}, "no revision 'v9'"),
        ({"name_or_path": REPO, "subfolder": "last"}, "holds no last/context_adapter_config.json"),
        ({"name_or_path": "some/lora"}, "no context adapter"),
        ({"name_or_path": "some/newer"}, "upgrade diffusers_ctx"),
        ({"name_or_path": REPO, "local_files_only": True}, "load it once while online"),
        ({"name_or_path": REPO, "token": "hf_expired"}, "Invalid credentials"),
    ]
    outcomes = call(hub, tmp_path / "home", *((RESOLVE, arguments) for arguments, _ in cases))
    for outcome, (_, words) in zip(outcomes, cases, strict=True):
        assert outcome["error"] == "AdapterError" and words in outcome["message"]
    assert not hub.sent("GET", ".*safetensors|/lfs/.*")


def test_an_adapter_in_a_subfolder_and_at_a_commit(hub, adapter, tmp_path):
    repo = hub.add_repo(REPO, {f"run/best/{name}": data for name, data in contents(adapter).items()})
    repo.commit("main", "empty it", {}, [])
    options = {"name_or_path": REPO, "subfolder": "run/best", "revision": repo.branches["main"][0].oid}
    (loaded,) = call(hub, tmp_path / "home", (RESOLVE, options | {"cache_dir": tmp_path / "cache"}))
    assert Path(loaded["path"]).is_relative_to(tmp_path / "cache")
    assert contents(Path(loaded["path"])) == contents(adapter)


def test_the_double_knows_its_user_and_refuses_strangers(hub, tmp_path):
    ask = "from huggingface_hub import whoami; print(whoami()['name'])"
    friend, stranger = (
        run_client(ask, endpoint=hub.endpoint, hf_home=tmp_path, HF_TOKEN=token) for token in (TOKEN, "hf_other")
    )
    assert friend.stdout.strip() == USER
    assert stranger.returncode == 1 and "401" in stranger.stderr
