"""Make the data sets that ship with the package from the full picture archives.

    python benchmarks/zoo/package_pictures.py --data ../shared/data

Writes `flowers.zip`, `photos.zip` and their credits (`*_credits.csv`) into `src/qhyvit/data/builtin/`. The order, the
draws and the zip headers are fixed, so the same inputs and the same JPEG library give the same bytes.

Flowers are cut to their central square before they are re-encoded: the evaluation transform crops the centre anyway,
and the bytes saved let all validation pictures ship.
"""

from __future__ import annotations

import argparse
import csv
import io
import random
import zipfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

DESTINATION = Path(__file__).resolve().parents[2] / "src" / "qhyvit" / "data" / "builtin"
LICENSE, LICENSE_URL = "CC BY 2.0", "https://creativecommons.org/licenses/by/2.0/"

FLOWERS_SIDE, FLOWERS_QUALITY, FLOWERS_CALIBRATION, FLOWERS_LIMIT = 144, 63, 256, 5_000_000
PHOTOS_QUALITY, PHOTOS_LIMIT = 60, 10_000_000

Row = dict[str, str]


def encode(picture: Image.Image, quality: int) -> bytes:
    """A progressive JPEG without metadata."""
    out = io.BytesIO()
    picture.convert("RGB").save(out, "JPEG", quality=quality, optimize=True, progressive=True)
    return out.getvalue()


def central_square(picture: Image.Image, side: int) -> Image.Image:
    """The central square, resized to at most `side` pixels."""
    short = min(picture.size)
    left, top = round((picture.width - short) / 2), round((picture.height - short) / 2)
    square = picture.crop((left, top, left + short, top + short))
    return square if short <= side else square.resize((side, side), Image.Resampling.LANCZOS)


def by_class(names: Iterable[str]) -> dict[str, list[str]]:
    """Picture paths, sorted, under the folder that holds them."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        if not name.endswith("/"):
            groups[name.split("/")[-2]].append(name)
    return dict(sorted(groups.items()))


def stratified(groups: dict[str, list[str]], count: int, rng: random.Random) -> list[str]:
    """`count` names drawn so that each class keeps its share (largest remainders)."""
    total = sum(map(len, groups.values()))
    exact = {name: count * len(members) / total for name, members in groups.items()}
    quota = {name: int(share) for name, share in exact.items()}
    largest = sorted(groups, key=lambda name: (quota[name] - exact[name], name))
    for name in largest[: count - sum(quota.values())]:
        quota[name] += 1
    return sorted(picked for name, members in groups.items() for picked in rng.sample(members, quota[name]))


def halves(groups: dict[str, list[str]], rng: random.Random) -> dict[str, str]:
    """Each name's part; classes split evenly, the odd picture goes to either half in turn."""
    parts = ("calibration", "evaluation")
    assigned: dict[str, str] = {}
    turn = 0
    for members in groups.values():
        for name in rng.sample(members, len(members)):
            assigned[name] = parts[turn % 2]
            turn += 1
    return assigned


def write_archive(path: Path, members: dict[str, bytes], limit: int) -> None:
    """Store the members in sorted order with fixed headers; refuse to write more than `limit` bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(members):
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, 0o644 << 16
            archive.writestr(info, members[name])
    if out.tell() > limit:
        raise SystemExit(f"{path.name} would take {out.tell():,} bytes, more than {limit:,}; lower the JPEG quality")
    replace(path, out.getvalue())
    print(f"{path.name}: {len(members)} pictures, {out.tell():,} bytes")


def write_credits(path: Path, rows: list[Row]) -> None:
    """A CSV file, sorted by picture."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda row: row["file"]))
    replace(path, out.getvalue().encode())


def replace(path: Path, content: bytes) -> None:
    """Write beside, then rename."""
    beside = path.with_suffix(".part")
    beside.write_bytes(content)
    beside.replace(path)


def package_flowers(data: Path, destination: Path) -> None:
    """All validation pictures for evaluation, a stratified draw of the training pictures for calibration."""
    members: dict[str, bytes] = {}
    rows: list[Row] = []
    changes = f"cropped to the central square, resized to {FLOWERS_SIDE} pixels, re-encoded"
    for part, source in (("calibration", "train"), ("evaluation", "val")):
        with zipfile.ZipFile(data / "flowers" / f"{source}.zip") as archive:
            groups = by_class(archive.namelist())
            names = sorted(name for group in groups.values() for name in group)
            if part == "calibration":
                names = stratified(groups, FLOWERS_CALIBRATION, random.Random(0))
            for name in names:
                label, file = name.split("/")[-2:]
                target = f"{part}/{label}/{file}"
                picture = Image.open(io.BytesIO(archive.read(name)))
                members[target] = encode(central_square(picture, FLOWERS_SIDE), FLOWERS_QUALITY)
                page = f"https://www.flickr.com/photo.gne?id={file.split('_')[0]}"
                rows.append(
                    {
                        "file": target,
                        "part": part,
                        "class": label,
                        "photo_page": page,
                        "license": LICENSE,
                        "license_url": LICENSE_URL,
                        "changes": changes,
                    }
                )
    write_archive(destination / "flowers.zip", members, FLOWERS_LIMIT)
    write_credits(destination / "flowers_credits.csv", rows)


def package_photos(data: Path, destination: Path) -> None:
    """All ImageNet-labelled photographs in two halves, with their credits carried over."""
    with (data / "imagenet-photos" / "credits.csv").open(encoding="utf-8", newline="") as file:
        credits_of = {row["file"]: row for row in csv.DictReader(file)}
    members: dict[str, bytes] = {}
    rows: list[Row] = []
    with zipfile.ZipFile(data / "imagenet-photos" / "photos.zip") as archive:
        for name, part in halves(by_class(archive.namelist()), random.Random(0)).items():
            credit = credits_of[name]
            if credit["license"] != LICENSE_URL:
                raise SystemExit(f"{name} is not {LICENSE}: {credit['license']}")
            target = f"{part}/{name}"
            members[target] = encode(Image.open(io.BytesIO(archive.read(name))), PHOTOS_QUALITY)
            kept = ("class_index", "wnid", "class_name", "author", "author_page", "photo_page")
            rows.append(
                {"file": target, "part": part}
                | {key: credit[key] for key in kept}
                | {
                    "license": LICENSE,
                    "license_url": LICENSE_URL,
                    "changes": "cropped and resized to 256 pixels, re-encoded",
                }
            )
    write_archive(destination / "photos.zip", members, PHOTOS_LIMIT)
    write_credits(destination / "photos_credits.csv", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), help="folder with flowers/, imagenet-photos/"
    )
    parser.add_argument("--destination", type=Path, default=DESTINATION)
    args = parser.parse_args()
    args.destination.mkdir(parents=True, exist_ok=True)
    package_flowers(args.data, args.destination)
    package_photos(args.data, args.destination)


if __name__ == "__main__":
    main()
