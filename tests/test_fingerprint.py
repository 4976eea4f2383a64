"""Fingerprints: equal for equal content, different for any other."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from diffusers_ctx.fingerprint import fingerprint


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def changed_weight() -> nn.Module:
    changed = model()
    changed[0].weight.data[1, 2] += 1e-6
    return changed


def changed_buffer() -> nn.Module:
    changed = model()
    changed[1].running_mean[0] = 1e-6
    return changed


def changed_name() -> nn.Module:
    return nn.ModuleDict(dict(zip("ab", model())))


@pytest.mark.parametrize("change", [changed_weight, changed_buffer, changed_name, lambda: model().bfloat16()])
def test_a_models_fingerprint_depends_on_every_value_name_and_type(change):
    assert fingerprint(model()) == fingerprint(model()) == fingerprint(model().state_dict())
    assert fingerprint(change()) != fingerprint(model())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("a", 1), ("a", 2)),
        (("a", 1), ("a", "1")),
        (("a", "b"), ("ab",)),
        (("a", ("b",)), ("a", "b")),
        ((1,), (1.0,)),
        ((1,), (True,)),
        (("None",), (None,)),
        (("a",), (b"a",)),
        (({"rank": 4},), ({"rank": 5},)),
        (({"rank": 4},), ({"Rank": 4},)),
        ((np.zeros(4),), (np.zeros((2, 2)),)),
        ((np.zeros(4, dtype=np.float32),), (np.zeros(4, dtype=np.int32),)),
        ((torch.zeros(4),), (torch.zeros(2, 2),)),
        ((torch.zeros(4),), (torch.zeros(4, dtype=torch.int32),)),
    ],
)
def test_other_parts_have_another_fingerprint(one, other):
    assert fingerprint(*one) != fingerprint(*other)


def test_equal_content_has_one_fingerprint(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    assert fingerprint(tmp_path / "a") == fingerprint(b"content")
    assert fingerprint({"a": 1, "b": [2, None]}) == fingerprint({"b": [2, None], "a": 1})
    assert fingerprint((1, 2)) == fingerprint([1, 2])
    values = torch.randn(3, 4)
    assert fingerprint(values.t()) == fingerprint(values.t().contiguous())
    assert fingerprint(values.numpy().T) == fingerprint(values.numpy().T.copy())
    assert fingerprint(torch.tensor(0.5)) and fingerprint(torch.zeros(0))
    assert len(fingerprint()) == 32


def test_it_is_the_same_in_another_process():
    code = "from diffusers_ctx.fingerprint import fingerprint; print(fingerprint({'a': 1, 'b': 'x'}, b'y', 0.1))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == fingerprint({"a": 1, "b": "x"}, b"y", 0.1)


def test_what_has_no_content_of_its_own_is_refused():
    with pytest.raises(TypeError, match="object has no fingerprint; pass what it consists of"):
        fingerprint({"a": [object()]})
    with pytest.raises(TypeError, match="set has no fingerprint"):
        fingerprint({"b", "a"})
    assert fingerprint(Path(__file__))
