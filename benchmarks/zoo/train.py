"""Train one zoo net from its recipe file; resumable, CPU or GPU.

    python benchmarks/zoo/train.py benchmarks/zoo/recipes/demo_mobilevit_xxs.yaml \
        --data ../shared/data --out runs/ [--resume] [--threads 1]

Pictures are decoded once into memory (squashed to a square, the true aspect ratio kept beside them), random crops
are drawn for a whole batch at a time. A checkpoint is written every epoch, so a stopped run goes on with --resume.
Writes `NAME.safetensors` (the averaged weights) and `NAME.json` (card: recipe, top-1) into --out.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import time
import zipfile
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.nn import functional as F


def read_zip(path: Path) -> tuple[list[Image.Image], list[int], list[str]]:
    """Pictures, labels and class names of a zip archive of class folders."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(n for n in archive.namelist() if n.lower().endswith((".jpg", ".jpeg", ".png")))
        classes = sorted({n.split("/")[-2] for n in names})
        pictures = [Image.open(io.BytesIO(archive.read(n))).convert("RGB") for n in names]
    return pictures, [classes.index(n.split("/")[-2]) for n in names], classes


def squash(pictures: list[Image.Image], size: int) -> tuple[Tensor, Tensor]:
    """All pictures as uint8 (N, 3, size, size), and their true width / height ratios (N,)."""
    data = torch.empty(len(pictures), 3, size, size, dtype=torch.uint8)
    for i, picture in enumerate(pictures):
        raw = picture.resize((size, size), Image.Resampling.BICUBIC).tobytes()
        data[i] = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)
    return data, torch.tensor([p.width / p.height for p in pictures])


def random_crops(data: Tensor, aspect: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Random resized crops, flips and brightness / contrast / saturation, a batch at a time; float in 0..1."""
    n, device = len(data), data.device

    def uniform(low: float, high: float) -> Tensor:
        return (torch.rand(n, generator=generator) * (high - low) + low).to(device)

    area, ratio = uniform(0.35, 1.0), uniform(math.log(3 / 4), math.log(4 / 3)).exp()
    width = (area * ratio / aspect).sqrt().clamp(max=1)
    height = (area * aspect / ratio).sqrt().clamp(max=1)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3, device=device)
    theta[:, 0, 0], theta[:, 0, 2] = width * flip, uniform(-1, 1) * (1 - width)
    theta[:, 1, 1], theta[:, 1, 2] = height, uniform(-1, 1) * (1 - height)
    grid = F.affine_grid(theta, [n, 3, size, size], align_corners=False)
    x = F.grid_sample(data.float() / 255, grid, align_corners=False, padding_mode="reflection")
    gray = x.mean(1, keepdim=True)
    x = gray + (x - gray) * uniform(0.6, 1.4).view(-1, 1, 1, 1)
    mean = x.mean((1, 2, 3), keepdim=True)
    return (mean + (x - mean) * uniform(0.6, 1.4).view(-1, 1, 1, 1)) * uniform(0.6, 1.4).view(-1, 1, 1, 1)


def top1(model: torch.nn.Module, x: Tensor, y: Tensor, batch: int = 128) -> float:
    """Fraction of pictures whose highest logit is the label's."""
    model.eval()
    with torch.inference_mode():
        hits = sum(int((model(x[i : i + batch]).argmax(1) == y[i : i + batch]).sum()) for i in range(0, len(x), batch))
    return hits / len(x)


def write(path: Path, save: Any) -> None:
    """Write beside, then rename: a stopped run leaves the old file whole."""
    beside = path.with_suffix(path.suffix + ".part")
    save(beside)
    beside.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    recipe = yaml.safe_load(args.recipe.read_text())
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(recipe["seed"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.out.mkdir(parents=True, exist_ok=True)

    def to_device(x: Tensor) -> Tensor:
        return x.to(device, memory_format=torch.channels_last)

    pictures, labels, classes = read_zip(args.data / recipe["train"])
    val_pictures, val_labels, val_classes = read_zip(args.data / recipe["val"])
    if classes != val_classes:
        raise SystemExit(f"{recipe['train']} and {recipe['val']} hold different classes")
    y, val_y = torch.tensor(labels, device=device), torch.tensor(val_labels, device=device)
    mean = torch.tensor(recipe["mean"], device=device).view(1, 3, 1, 1)
    std = torch.tensor(recipe["std"], device=device).view(1, 3, 1, 1)

    model = timm.create_model(recipe["model"], **recipe["model_args"]).to(device, memory_format=torch.channels_last)
    ema = ModelEmaV3(model, decay=recipe["ema"], use_warmup=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=recipe["weight_decay"])
    generator = torch.Generator().manual_seed(recipe["seed"])
    checkpoint = args.out / f"{recipe['name']}.ckpt"
    done = 0
    if args.resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        done = state["epoch"]

    epoch, score, started = 0, 0.0, time.time()
    for stage in recipe["stages"]:
        size, epochs = stage["size"], stage["epochs"]
        if done >= epoch + epochs:
            epoch += epochs
            continue
        data, aspect = squash(pictures, int(size * 1.25))
        data, aspect = data.to(device), aspect.to(device)
        transform = create_transform(
            (3, size, size), crop_pct=recipe["crop_pct"], interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1)
        )
        val_x = to_device((torch.stack([transform(p) for p in val_pictures]).to(device) - mean) / std)
        steps = len(data) // recipe["batch"]
        for local in range(epochs):
            epoch += 1
            if epoch <= done:
                continue
            model.train()
            order, total = torch.randperm(len(data), generator=generator), 0.0
            for step in range(steps):
                at = (local + step / steps) / epochs
                warm = min(1.0, (local * steps + step + 1) / (2 * steps))
                for group in optimizer.param_groups:
                    group["lr"] = stage["lr"] * warm * (0.5 + 0.5 * math.cos(math.pi * at)) + 1e-6
                pick = order[step * recipe["batch"] : (step + 1) * recipe["batch"]].to(device)
                x = (random_crops(data[pick], aspect[pick], size, generator) - mean) / std
                other = torch.randperm(len(pick), generator=generator).to(device)
                share = float(torch.rand((), generator=generator)) * recipe["mixup"]
                x = to_device(x * (1 - share) + x[other] * share)
                with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
                    out = model(x).float()
                losses = [
                    F.cross_entropy(out, t, label_smoothing=recipe["label_smoothing"])
                    for t in (y[pick], y[pick][other])
                ]
                loss = losses[0] * (1 - share) + losses[1] * share
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
                optimizer.step()
                ema.update(model)
                total += float(loss.detach())
            if epoch % 5 == 0 or local == epochs - 1:
                score = top1(ema.module, val_x, val_y)
            print(
                f"epoch {epoch} size {size} loss {total / steps:.3f} top-1 {score:.4f} {time.time() - started:.0f} s",
                flush=True,
            )
            state = {
                "model": model.state_dict(),
                "ema": ema.state_dict(),
                "optimizer": optimizer.state_dict(),
                "generator": generator.get_state(),
                "epoch": epoch,
            }
            write(checkpoint, lambda p, s=state: torch.save(s, p))

    weights = {k: v.detach().cpu().contiguous() for k, v in ema.module.state_dict().items()}
    write(args.out / f"{recipe['name']}.safetensors", lambda p: save_file(weights, p))
    card = {
        "model": recipe["model"],
        "library": f"timm {timm.__version__}",
        "create": {"model_name": recipe["model"], **recipe["model_args"]},
        "classes": classes,
        "input": [3, size, size],
        "mean": recipe["mean"],
        "std": recipe["std"],
        "crop_pct": recipe["crop_pct"],
        "interpolation": "bicubic",
        "val_top1": round(score, 4),
        "val": f"{recipe['val']}, {len(val_pictures)} pictures",
        "recipe": recipe,
    }
    write(args.out / f"{recipe['name']}.json", lambda p: p.write_text(json.dumps(card, indent=1)))


if __name__ == "__main__":
    main()
