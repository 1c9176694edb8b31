"""torchvision's classifiers by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from qhyvit.data.preprocessing import Preprocessing
from qhyvit.errors import ModelError
from qhyvit.models import load_model
from qhyvit.models.from_torchvision import build_torchvision

NAME = "torchvision/mobilenet_v3_small"


@pytest.mark.parametrize("name", [NAME, "torchvision.models:mobilenet_v3_small"])
def test_by_name_or_as_a_builder(name: str) -> None:
    loaded = load_model(name, seed=3)
    assert isinstance(loaded.module, torchvision.models.MobileNetV3)
    assert (loaded.name, loaded.num_classes, loaded.trained) == (name, 1000, False)
    again = load_model(name, seed=3).module.state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in loaded.module.state_dict().items())


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b1", "inception_v3", "swin_t", "maxvit_t", "vit_b_16"])
def test_preprocessing_is_that_of_torchvisions_weights(name: str) -> None:
    """Compared on a picture: what torchvision's own transform gives."""
    from PIL import Image

    pixels = torch.randint(0, 256, (600, 800, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    picture = Image.fromarray(pixels.numpy())
    with torch.device("meta"):
        _, config = build_torchvision(f"torchvision/{name}", None, False, None)
    expected = torchvision.models.get_model_weights(name).DEFAULT.transforms()(picture)
    torch.testing.assert_close(Preprocessing.from_config(config)(picture), expected)


def test_weights_say_how_many_classes(tmp_path: Path) -> None:
    trained = torchvision.models.mobilenet_v3_small(num_classes=7)
    save_file(trained.state_dict(), tmp_path / "net.safetensors")
    loaded = load_model(NAME, weights=tmp_path / "net.safetensors")
    assert (loaded.num_classes, loaded.trained) == (7, True)
    assert torch.equal(loaded.module.state_dict()["classifier.3.weight"], trained.classifier[3].weight)


def test_weights_of_another_net_are_refused(tmp_path: Path) -> None:
    save_file(torchvision.models.squeezenet1_1(num_classes=7).state_dict(), tmp_path / "net.safetensors")
    with pytest.raises(ModelError, match="do not fit"):
        load_model(NAME, weights=tmp_path / "net.safetensors")


def test_pretrained_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(ModelError, match=r"could not be fetched \(OSError: no route to host\).*--weights"):
        load_model(NAME, pretrained=True)


def test_names_that_are_no_classifier() -> None:
    with pytest.raises(ModelError, match="did you mean resnet18"):
        load_model("torchvision/resnet81")
    with pytest.raises(ModelError, match="no classifier called 'fcn_resnet50'"):
        load_model("torchvision/fcn_resnet50")


def test_a_name_that_only_torchvision_has() -> None:
    with pytest.raises(ModelError, match=r"did you mean torchvision/vit_b_16\?"):
        load_model("vit_b_16")
