import pytest

from diffusers_ctx.adapter_format import AdapterError
from diffusers_ctx.hub import resolve_adapter_folder


def test_a_local_folder_is_found_and_goes_before_the_hub(adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_adapter_folder(adapter) == adapter
    assert resolve_adapter_folder("adapter").resolve() == adapter
    assert resolve_adapter_folder(tmp_path, subfolder="adapter") == adapter


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_name_that_is_neither_folder_nor_repository(name):
    with pytest.raises(AdapterError, match=f"There is no folder '{name}'; check the path: "):
        resolve_adapter_folder(name)


def test_a_name_without_an_owner_is_not_asked_for_on_the_hub(adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # which has the folder "adapter" alone
    for name, near in {"weather-contxt": "the folders in '.' are adapter.", "quad": "write owner/name"}.items():
        with pytest.raises(AdapterError) as raised:
            resolve_adapter_folder(name)
        assert str(raised.value).startswith(f"There is no folder '{name}'; check the path: ")
        assert near in str(raised.value) and 'pass `embedded_adapter("quad")`' in str(raised.value)


def test_a_file_is_no_folder(adapter):
    with pytest.raises(AdapterError, match="pass the adapter's folder"):
        resolve_adapter_folder(adapter / "context_adapter.safetensors")
