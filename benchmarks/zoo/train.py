"""Train one zoo net from its recipe file; resumable, CPU or GPU.

    python benchmarks/zoo/train.py benchmarks/zoo/recipes/mobilevit_xxs.yaml \
        --data ../shared/data --out runs/ [--minutes 15] [--resume] [--threads 1]

Pictures are decoded once into memory (squashed to a square, the true aspect ratio kept beside them) and augmented a
whole batch at a time. The recipe's stages last for so many epochs, or for a share of --minutes; the learning rate
ends annealed either way. A checkpoint is written every epoch, so a stopped run goes on with --resume.
Writes into --out: `NAME.safetensors` (the averaged weights; matrices as fp16), `NAME.json` (the card: how the net is
built and fed, recipe, cost, and top-1 of the weights as written), `NAME.history.json` (a row for each epoch).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from output import began_from, stored, write, write_card
from pictures import augment, read_archives, squash
from safetensors.torch import load_file, save_file
from schedule import Clock, Stage, read_stages
from teacher import soft_labels
from timm.data import create_transform
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.nn import functional as F

import qhyvit.models  # noqa: F401  registers the nets that timm lacks
from qhyvit.models.zoo import is_zoo, zoo_weights


class Trainer:
    """A net in training, and all that a checkpoint must hold."""

    def __init__(self, recipe: dict[str, Any], args: argparse.Namespace) -> None:
        self.recipe, self.out = recipe, args.out
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.minutes = args.minutes or recipe.get("minutes")
        self.stages = read_stages(recipe, self.minutes)
        archives = [recipe["train"]] if isinstance(recipe["train"], str) else recipe["train"]
        self.train = read_archives([args.data / name for name in archives])
        self.val_path = args.data / recipe["val"]
        self.val = read_archives([self.val_path])
        if self.train.classes != self.val.classes:
            raise SystemExit(f"{recipe['train']} and {recipe['val']} hold different classes")
        self.labels, self.val_labels = self.train.labels.to(self.device), self.val.labels.to(self.device)
        self.mean, self.std = (torch.tensor(recipe[k], device=self.device).view(1, 3, 1, 1) for k in ("mean", "std"))

        torch.manual_seed(recipe["seed"])
        self.model = timm.create_model(recipe["model"], **recipe["model_args"])
        self.init: Path | None = None
        if init := recipe.get("init"):
            self.init = zoo_weights(init) if is_zoo(init) else args.data / init
            self.model.load_state_dict(load_file(self.init))
        self.model.to(self.device, memory_format=torch.channels_last)
        self.ema = ModelEmaV3(self.model, decay=recipe["ema"], use_warmup=True)
        self.optimizer = torch.optim.AdamW(decayed(self.model, recipe["weight_decay"]), lr=1e-3, fused=True)
        self.generator = torch.Generator().manual_seed(recipe["seed"])
        self.targets = self.soft_targets()
        self.clock, self.history = Clock(), list[dict[str, Any]]()
        self.stage = self.step = self.epoch = self.seen = 0
        self.checkpoint = self.out / f"{recipe['name']}.ckpt"
        if args.resume and self.checkpoint.exists():
            self.restore()
        self.clock.restart(self.clock.seconds if not self.history else self.history[-1]["seconds"])

    def soft_targets(self) -> Tensor:
        """What the net shall say, (pictures, classes): smoothed labels, mixed with what the teachers say."""
        smoothing, classes = self.recipe["label_smoothing"], len(self.train.classes)
        targets = F.one_hot(self.labels, classes) * (1 - smoothing) + smoothing / classes
        if not (settings := self.recipe.get("teacher")):
            return targets
        said = soft_labels(settings["nets"], self.train.images, self.device, cache=self.out)
        return targets * (1 - settings["share"]) + said * settings["share"]

    def run(self) -> None:
        """All stages that are left, then the weights and their card."""
        while self.stage < len(self.stages):
            stage = self.stages[self.stage]
            loader, done = Loader(self, stage), False
            while not done:
                self.one_epoch(stage, loader)
                done = self.progress(stage, loader.steps) >= 1
                if done:
                    self.stage, self.step = self.stage + 1, 0
                self.record(stage, loader)
        self.finish()

    def progress(self, stage: Stage, steps: int) -> float:
        """Share of the current stage that is done."""
        if stage.share is None:
            return self.step / (stage.epochs * steps)
        before = sum(earlier.share for earlier in self.stages[: self.stage])
        return (self.clock.seconds / (self.minutes * 60) - before) / stage.share

    def one_epoch(self, stage: Stage, loader: Loader) -> None:
        """One pass over the pictures, or as much of it as the stage's time allows."""
        self.model.train()
        warm_up, total, count = self.recipe.get("warm_up", 2 * loader.steps), 0.0, 0
        for x, y in loader:
            if (at := self.progress(stage, loader.steps)) >= 1:
                break
            warm = min(1.0, (self.step + 1) / warm_up) if self.stage == 0 or stage.epochs else 1.0
            for group in self.optimizer.param_groups:
                group["lr"] = stage.rate(at) * warm
            with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
                out = self.model(x).float()
            loss = F.cross_entropy(out, y)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
            self.optimizer.step()
            self.step += 1
            self.ema.update(self.model)
            self.seen += len(x)
            total, count = total + float(loss.detach()), count + 1
        self.epoch += 1
        self.loss = total / max(count, 1)

    def record(self, stage: Stage, loader: Loader) -> None:
        """A row of the history, printed and written, and a checkpoint."""
        row = {"epoch": self.epoch, "size": stage.size, "loss": round(self.loss, 4), "pictures": self.seen}
        if self.epoch % self.recipe.get("score_every", 1) == 0 or self.step == 0:
            row["val_top1"] = top1(self.ema.module, *loader.val())
        self.history.append({**row, "seconds": round(self.clock.seconds, 1)})
        print(self.history[-1], flush=True)
        write(self.out / f"{self.recipe['name']}.history.json", lambda p: p.write_text(json.dumps(self.history)))
        write(self.checkpoint, lambda p: torch.save(self.state(), p))

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        counters = {key: getattr(self, key) for key in ("stage", "step", "epoch", "seen", "history")}
        parts = {key: getattr(self, key).state_dict() for key in ("model", "ema", "optimizer")}
        return {**counters, **parts, "generator": self.generator.get_state(), "random": torch.get_rng_state()}

    def restore(self) -> None:
        """Go on from the checkpoint."""
        state = torch.load(self.checkpoint, weights_only=True, map_location=self.device)
        for key in ("model", "ema", "optimizer"):
            getattr(self, key).load_state_dict(state.pop(key))
        self.generator.set_state(state.pop("generator").cpu())
        torch.set_rng_state(state.pop("random").cpu())
        for key, value in state.items():
            setattr(self, key, value)

    def finish(self) -> None:
        """Write weights and card."""
        recipe, path = self.recipe, self.out / f"{self.recipe['name']}.safetensors"
        write(path, lambda p: save_file(stored(self.ema.module.state_dict(), recipe.get("fp16", True)), p))
        told = {
            "classes": self.train.classes,
            "val": f"{recipe['val']}, {len(self.val.images)} pictures",
            "minutes": round(self.clock.seconds / 60, 1),
            "pictures_seen": self.seen,
        }
        if self.init:
            told["began_from"] = began_from(recipe["init"], self.init)
        score = write_card(path, recipe, self.stages[-1].size, told, self.val_path)
        print(f"{path}: top-1 {score:.4f}", flush=True)


class Loader:
    """A stage's pictures: augmented batches with soft targets, a fresh pass each time; and those of validation."""

    def __init__(self, trainer: Trainer, stage: Stage) -> None:
        self._trainer, self._size = trainer, stage.size
        recipe = trainer.recipe
        data, aspect = squash(trainer.train.images, int(stage.size * recipe.get("margin", 1.25)))
        self._data, self._aspect = data.to(trainer.device), aspect.to(trainer.device)
        self.steps = len(data) // recipe["batch"]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        t, recipe = self._trainer, self._trainer.recipe
        order = torch.randperm(len(self._data), generator=t.generator)
        for pick in order.split(recipe["batch"])[: self.steps]:
            pick = pick.to(t.device)
            images = augment(self._data[pick], self._aspect[pick], self._size, recipe.get("augment", {}), t.generator)
            x, y = (images - t.mean) / t.std, t.targets[pick]
            if recipe["mixup"]:
                other = torch.randperm(len(pick), generator=t.generator).to(t.device)
                share = float(torch.rand((), generator=t.generator)) * recipe["mixup"]
                x, y = x * (1 - share) + x[other] * share, y * (1 - share) + y[other] * share
            yield x.contiguous(memory_format=torch.channels_last), y

    def val(self) -> tuple[Tensor, Tensor]:
        """Validation pictures as the net gets them at this stage's size, and labels."""
        t, size = self._trainer, self._size
        transform = create_transform(
            (3, size, size), crop_pct=t.recipe["crop_pct"], interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1)
        )
        x = (torch.stack([transform(image) for image in t.val.images]).to(t.device) - t.mean) / t.std
        return x.contiguous(memory_format=torch.channels_last), t.val_labels


def decayed(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: weight decay for matrices and kernels, none for biases, norms and tables by position."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def top1(model: torch.nn.Module, x: Tensor, y: Tensor, batch: int = 128) -> float:
    """Fraction of pictures whose highest logit is the label's."""
    model.eval()
    with torch.inference_mode():
        hits = sum(int((model(x[i : i + batch]).argmax(1) == y[i : i + batch]).sum()) for i in range(0, len(x), batch))
    return hits / len(x)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--minutes", type=float, help="how long to train, where the stages are shares; over the recipe")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    args.out.mkdir(parents=True, exist_ok=True)
    Trainer(yaml.safe_load(args.recipe.read_text()), args).run()


if __name__ == "__main__":
    main()
