"""Models given as "pkg.mod:builder"."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qhyvit.errors import ModelError
from qhyvit.models import load_model

NETS = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=3):
        super().__init__()
        self.fc = nn.Linear(3, num_classes)
    def forward(self, x):
        return self.fc(x.mean((2, 3)))

def build():
    from qhyvit_test_lazy import BITS
    return Net()

def sized(num_classes=3, pretrained=False):
    net = Net(num_classes)
    net.asked = pretrained
    return net

def number(): return 3
def fails(): raise RuntimeError("no such width")
def needs(width): return Net()
ready = Net(4)
limit = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "qhyvit_test_nets.py").write_text(NETS)
    (tmp_path / "qhyvit_test_lazy.py").write_text("BITS = 8")
    (tmp_path / "qhyvit_test_broken.py").write_text("import qhyvit_test_absent")
    (tmp_path / "qhyvit_test_syntax.py").write_text("def (")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("qhyvit_test_")]:
        del sys.modules[name]


def test_a_builder_in_the_current_folder() -> None:
    path = list(sys.path)
    model = load_model("qhyvit_test_nets:build")
    assert sys.path == path
    assert (model.name, model.num_classes, model.trained) == ("qhyvit_test_nets:build", 3, False)
    assert model.source == "weights as qhyvit_test_nets:build made them (seed 0)"
    assert model.preprocessing_config["input_size"] == (3, 224, 224)


def test_builders_are_seeded() -> None:
    one, again, other = (load_model("qhyvit_test_nets:build", seed=s).module.fc.weight for s in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_arguments_go_to_builders_that_take_them(folder: Path) -> None:
    model = load_model("qhyvit_test_nets:sized", num_classes=6, pretrained=True)
    assert (model.num_classes, model.module.asked, model.trained) == (6, True, True)
    with pytest.raises(ModelError, match="takes no argument 'pretrained'"):
        load_model("qhyvit_test_nets:build", pretrained=True)
    with pytest.raises(ModelError, match="has 3 classes, not 6"):
        load_model("qhyvit_test_nets:build", num_classes=6)


def test_builder_with_weights_and_card(folder: Path) -> None:
    state = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.zeros(2)}
    save_file(state, folder / "net.safetensors")
    (folder / "net.json").write_text('{"classes": ["cat", "dog"], "input": [3, 32, 32], "mean": [0.5, 0.5, 0.5]}')
    model = load_model("qhyvit_test_nets:sized", weights=folder / "net.safetensors")
    assert model.class_names == ("cat", "dog")
    assert torch.equal(model.module.fc.weight, state["fc.weight"])
    assert model.preprocessing_config["mean"] == (0.5, 0.5, 0.5)
    assert model.trained


def test_a_ready_module_is_copied() -> None:
    model = load_model("qhyvit_test_nets:ready")
    assert model.num_classes == 4
    assert sys.modules["qhyvit_test_nets"].ready.training
    assert not model.module.training


def test_installed_packages_serve() -> None:
    assert load_model("torchvision.models:squeezenet1_1", num_classes=5, input_size=64).num_classes == 5


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("qhyvit_test_none:build", "There is no module 'qhyvit_test_none'"),
        ("qhyvit_test_nets.inner:build", "There is no module 'qhyvit_test_nets.inner'"),
        ("qhyvit_test_broken:build", "cannot be imported (ModuleNotFoundError: No module named 'qhyvit_test_absent')"),
        ("qhyvit_test_syntax:build", "cannot be imported (SyntaxError"),
        ("qhyvit_test_nets:biuld", "has no function 'biuld'; did you mean 'build'?"),
        ("qhyvit_test_nets:zzz", "has no function 'zzz'"),
        ("qhyvit_test_nets:limit", "is a int, not a function"),
        ("qhyvit_test_nets:number", "returned a int; it must return an nn.Module"),
        ("qhyvit_test_nets:fails", "failed (RuntimeError: no such width)"),
        ("qhyvit_test_nets:needs", "without arguments"),
        ("qhyvit_test_nets:", "must be of the form pkg.module:builder"),
        (":build", "must be of the form pkg.module:builder"),
        (".nets:build", "must be of the form pkg.module:builder"),
    ],
)
def test_errors_say_what_is_wrong(name: str, said: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(name)
    assert said in str(caught.value)
    assert name.split(":")[0] in str(caught.value)
