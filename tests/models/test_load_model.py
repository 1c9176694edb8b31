"""`load_model`: timm nets, weights files with their cards, modules, the demo net, and what is said when it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qhyvit.errors import ModelError
from qhyvit.models import LoadedModel, list_models, load, load_model

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data" / "weights"
NET = "mobilevit_xxs"


def state_of(model: LoadedModel | nn.Module) -> dict[str, Tensor]:
    return (model.module if isinstance(model, LoadedModel) else model).state_dict()


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A net whose weights no seed of the tests gives."""
    torch.manual_seed(1234)
    return timm.create_model(NET, num_classes=7)


@pytest.fixture
def weights(tmp_path: Path, trained: nn.Module) -> Path:
    save_file(trained.state_dict(), tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def write_card(weights: Path, **keys: Any) -> None:
    weights.with_suffix(".json").write_text(json.dumps(keys))


# ---- random weights


def test_random_weights_follow_the_seed_and_leave_the_callers_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one, again, other = (load_model(NET, num_classes=4, input_size=64, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.rand(3), expected)
    assert same(state_of(one), state_of(again))
    assert not same(state_of(one), state_of(other))
    assert not one.trained
    assert one.source == "random weights (seed 3)"


def test_timm_net_is_ready_for_use() -> None:
    model = load_model(NET)
    assert not model.module.training
    assert (model.name, model.num_classes, model.class_names) == (NET, 1000, None)
    assert model.preprocessing_config == timm.data.resolve_model_data_config(timm.create_model(NET))


def test_input_size_reaches_nets_that_are_built_for_one_size() -> None:
    model = load_model("efficientformerv2_s0", input_size=128, num_classes=3)
    assert model.preprocessing_config["input_size"] == (3, 128, 128)
    assert model.module(torch.rand(1, 3, 128, 128)).shape == (1, 3)
    with pytest.raises(ModelError, match="efficientformer_l1 cannot take a 3×192×192 picture"):
        load_model("efficientformer_l1", input_size=192)


def test_loading_leaves_no_trace_of_the_trial_picture() -> None:
    model = load_model("efficientformer_l1")  # caches its tables by device on the first run
    assert not any(m.attention_bias_cache for m in model.module.modules() if hasattr(m, "attention_bias_cache"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mobilvit_xxs", "did you mean mobilevit_xxs"),
        ("mobilevit_xxs.nowhere", "known: mobilevit_xxs.cvnets_in1k"),
        ("zzzz", "pkg.module:builder"),
        ("vit_tiny_patch16_224.augreg_in21k_ft_in1k_", "known: "),
    ],
)
def test_unknown_timm_names(name: str, said: str) -> None:
    with pytest.raises(ModelError, match=name) as caught:
        load_model(name)
    assert said in str(caught.value)


def test_net_without_classifier_is_refused() -> None:
    with pytest.raises(ModelError, match="no classifier"):
        load_model("vit_small_patch14_dinov2", input_size=28)


@pytest.mark.parametrize("option", ["input_size", "num_classes"])
def test_sizes_must_be_positive(option: str) -> None:
    with pytest.raises(ModelError, match="at least 1, not 0"):
        load_model(NET, **{option: 0})


# ---- pretrained


def test_unreachable_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> nn.Module:
        raise ConnectionError("Name or service not known\nmore lines")

    monkeypatch.setattr(timm, "create_model", unreachable)
    for name, pretrained in ((NET, True), ("hf-hub:someone/net", False)):
        with pytest.raises(ModelError, match="hub") as caught:
            load_model(name, pretrained=pretrained)
        assert "ConnectionError: Name or service not known)" in str(caught.value)
        assert "--weights" in str(caught.value)


def test_pretrained_weights_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    real = timm.create_model

    def fetched(name: str, pretrained: bool, **arguments: Any) -> nn.Module:
        asked.update(arguments, pretrained=pretrained)
        return real(name)

    monkeypatch.setattr(timm, "create_model", fetched)
    model = load_model(NET, pretrained=True, input_size=64)
    assert asked["pretrained"]
    assert model.trained
    # A classifier of another size would be left random.
    with pytest.raises(ModelError, match="1000 classes, not 5"):
        load_model(NET, pretrained=True, num_classes=5)


def test_net_that_timm_has_no_weights_for() -> None:
    name = next(n for n in timm.list_models() if not (timm.get_pretrained_cfg(n) or timm.PretrainedCfg()).has_weights)
    with pytest.raises(ModelError, match="no pretrained weights"):
        load_model(name, pretrained=True)


def test_two_sources_of_weights_are_refused(weights: Path) -> None:
    with pytest.raises(ModelError, match="one of the two"):
        load_model(NET, weights=weights, pretrained=True)


# ---- weights files


def test_weights_set_the_number_of_classes(weights: Path, trained: nn.Module) -> None:
    model = load_model(NET, weights=weights, input_size=64)
    assert model.num_classes == 7
    assert same(state_of(model), trained.state_dict())
    assert model.trained
    assert str(weights) in model.source


def test_classes_of_a_distilled_net_are_found(tmp_path: Path) -> None:
    save_file(timm.create_model("efficientformerv2_s0", num_classes=6).state_dict(), tmp_path / "net.safetensors")
    assert load_model("efficientformerv2_s0", weights=tmp_path / "net.safetensors").num_classes == 6


def test_half_precision_weights_become_float32(tmp_path: Path, trained: nn.Module) -> None:
    save_file(
        {k: v.half() if v.is_floating_point() else v for k, v in state_of(trained).items()}, tmp_path / "h.safetensors"
    )
    model = load_model(NET, weights=tmp_path / "h.safetensors", input_size=64)
    assert {p.dtype for p in model.module.parameters()} == {torch.float32}


def test_contradicting_number_of_classes(weights: Path) -> None:
    with pytest.raises(ModelError, match="have 7 classes, not 5"):
        load_model(NET, weights=weights, num_classes=5)


def test_weights_of_another_net_name_the_keys(weights: Path) -> None:
    with pytest.raises(ModelError, match=r"of another shape: stages\.0\.0") as caught:
        load_model("mobilevit_xs", weights=weights)
    assert str(weights) in str(caught.value)
    with pytest.raises(ModelError, match=r"missing: .* more; unexpected: .* more"):
        load_model("efficientformer_l1", weights=weights)


def test_card_sets_preprocessing_and_class_names(weights: Path) -> None:
    names = [f"flower {i}" for i in range(7)]
    write_card(
        weights,
        create={"model_name": NET, "num_classes": 7, "drop_path_rate": 0.1},
        classes=names,
        input=[3, 96, 96],
        mean=[0.1, 0.2, 0.3],
        std=[0.4, 0.5, 0.6],
        crop_pct=0.8,
        interpolation="bilinear",
        val_top1=0.875,
        val="val.zip",
    )
    model = load_model(NET, weights=weights)
    assert model.class_names == tuple(names)
    assert model.preprocessing_config == {
        "input_size": (3, 96, 96),
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
        "crop_pct": 0.8,
        "crop_mode": "center",
        "interpolation": "bilinear",
    }
    assert "top-1 87.5% on val.zip" in model.source
    assert load_model(NET, weights=weights, input_size=64).preprocessing_config["input_size"] == (3, 64, 64)


def test_card_arguments_reach_the_net(tmp_path: Path) -> None:
    save_file(
        timm.create_model("efficientformerv2_s0", num_classes=2, img_size=128).state_dict(),
        tmp_path / "net.safetensors",
    )
    write_card(tmp_path / "net.safetensors", input=[3, 128, 128])
    model = load_model("efficientformerv2_s0", weights=tmp_path / "net.safetensors")
    assert model.module(torch.rand(1, 3, 128, 128)).shape == (1, 2)


def test_card_of_another_net_or_with_other_classes(weights: Path) -> None:
    write_card(weights, create={"model_name": "mobilevit_s"})
    with pytest.raises(ModelError, match="weights of mobilevit_s, not of mobilevit_xxs"):
        load_model(NET, weights=weights)
    save_file(Classifier(3).state_dict(), weights)
    write_card(weights, classes=["a", "b"])
    with pytest.raises(ModelError, match="names 2 classes, but Classifier has 3"):
        load_model(Classifier(3), weights=weights)


@pytest.mark.parametrize(
    ("name", "classes", "side"), [("mobilevit_xxs_tin100", 100, 64), ("mobilevitv2_050_tin100", 100, 64)]
)
def test_shared_nets(name: str, classes: int, side: int) -> None:
    path = SHARED / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"{path} is not on this machine")
    model = load_model(name.removesuffix("_tin100"), weights=path)
    assert model.num_classes == classes
    assert model.preprocessing_config["input_size"] == (3, side, side)
    # The cards give these only in a sentence.
    assert model.preprocessing_config["mean"] == (0.485, 0.456, 0.406)
    assert model.preprocessing_config["crop_pct"] == 1.0
    # A trained net is sure of something; one whose BatchNorm or classifier was not loaded is not.
    with torch.no_grad():
        sure = model.module(torch.rand(4, 3, side, side)).softmax(1).amax(1)
    assert (sure > 0.03).all()


# ---- modules


class Classifier(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.drop = nn.Dropout()
        self.fc = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.conv(x).mean((2, 3))))


def test_a_module_is_copied() -> None:
    mine = Classifier(3).double()
    model = load_model(mine, input_size=16)
    assert (model.name, model.num_classes, model.trained) == ("Classifier", 3, True)
    assert model.preprocessing_config["input_size"] == (3, 16, 16)
    assert not model.module.training
    assert model.module.fc.weight.dtype == torch.float32
    assert mine.training
    assert mine.fc.weight.dtype == torch.float64
    assert torch.equal(model.module.fc.weight, mine.fc.weight.float())


def test_weights_are_loaded_into_the_copy(tmp_path: Path) -> None:
    other, mine = Classifier(3), Classifier(3)
    save_file(other.state_dict(), tmp_path / "net.safetensors")
    before = {key: value.clone() for key, value in mine.state_dict().items()}
    assert same(state_of(load_model(mine, weights=tmp_path / "net.safetensors")), other.state_dict())
    assert same(mine.state_dict(), before)


@pytest.mark.parametrize(
    ("module", "options", "said"),
    [
        (nn.Conv2d(3, 2, 1), {}, r"a tensor of shape \[1, 2, 224, 224\]"),
        (nn.Linear(3, 3), {}, "cannot take a 3×224×224 picture"),
        (Classifier(3), {"num_classes": 4}, "has 3 classes, not 4"),
        (Classifier(3), {"pretrained": True}, "no pretrained weights"),
        (nn.LSTM(224, 2), {}, "cannot take"),
    ],
)
def test_modules_that_do_not_serve(module: nn.Module, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        load_model(module, **options)


# ---- the demo net and the list


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Files as the training script writes them, in place of those that ship."""
    path = tmp_path / "demo_mobilevit_xxs.safetensors"
    state = timm.create_model(NET, num_classes=5).state_dict()
    save_file(state, path)
    write_card(
        path,
        model=NET,
        library="timm",
        create={"model_name": NET, "num_classes": 5},
        classes=["daisy", "dandelion", "roses", "sunflowers", "tulips"],
        input=[3, 128, 128],
        mean=[0.0, 0.0, 0.0],
        std=[1.0, 1.0, 1.0],
        crop_pct=0.9,
        interpolation="bicubic",
        val_top1=0.8613,
        val="flowers/val.zip, 736 pictures",
        recipe={"name": "demo_mobilevit_xxs"},
    )
    monkeypatch.setattr(load, "DEMO_WEIGHTS", path)
    return state


def test_demo(demo: dict[str, Tensor]) -> None:
    model = load_model("demo")
    assert same(state_of(model), demo)
    assert (model.name, model.num_classes, model.trained) == ("demo", 5, True)
    assert model.class_names is not None
    assert model.class_names[0] == "daisy"
    assert model.preprocessing_config["input_size"] == (3, 128, 128)
    assert model.preprocessing_config["std"] == (1.0, 1.0, 1.0)
    assert "86.1%" in model.source


def test_demo_takes_no_other_weights(demo: dict[str, Tensor], weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="its own weights"):
        load_model("demo", weights=weights)
    monkeypatch.setattr(load, "DEMO_WEIGHTS", weights.with_name("gone.safetensors"))
    with pytest.raises(ModelError, match="install qhyvit again"):
        load_model("demo")


def test_list_of_models(demo: dict[str, Tensor]) -> None:
    rows = {row["name"]: row for row in list_models()}
    assert next(iter(rows)) == "demo"
    assert rows["demo"]["input_size"] == (3, 128, 128)
    # Published sizes.
    assert rows["mobilevit_s"]["parameters"] == pytest.approx(5.6, abs=0.05)
    assert rows["mobilevit_s"]["input_size"] == (3, 256, 256)
    assert {"mobilevitv2_200", "efficientformer_l7", "efficientformerv2_s0"} <= rows.keys()
    assert rows["demo"]["parameters"] < rows["mobilevit_xxs"]["parameters"]


def test_list_without_demo_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "DEMO_WEIGHTS", tmp_path / "gone.safetensors")
    assert "demo" not in [row["name"] for row in list_models()]
