"""Two made data sets as a stranger would lay them out, of shapes that the demo does not have."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["write_medical", "write_sentiment"]


def write_medical(folder: Path, records: int = 72) -> Path:
    """Scans, notes and a table with blanks, from three hospitals; some records lack a scan or a
    note. What is looked for shows as a bright spot, as words, and as a high value."""
    draw = np.random.default_rng(3)
    for name in ("scans", "notes"):
        (folder / name).mkdir(parents=True)
    path = folder / "manifest.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(
            ["id", "split", "client", "subject", "label", "scan", "note", "age", "sex", "ward",
             "temperature", "crp"]
        )  # fmt: skip
        for k in range(records):
            ill = int(draw.random() < 0.4)
            scan, note = f"scans/{k:04}.png", f"notes/{k:04}.txt"
            pixels = draw.normal(90, 20, (40, 48))
            pixels[10:20, 12:24] += 90 * ill
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / scan)
            said = "opacity on the left, fever since monday" if ill else "clear lungs, feels well"
            (folder / note).write_text(f"Patient seen in the morning; {said}.\n")
            crp = f"{draw.lognormal(3 + 1.5 * ill, 0.6):.1f}"
            cells = [f"{draw.integers(18, 95)}", draw.choice(["F", "M"]), f"{36.6 + 1.4 * ill:.1f}"]
            age, sex, heat = (cell if draw.random() > 0.15 else "" for cell in cells)
            rows.writerow([
                f"study-{k:04}",
                ("train", "train", "train", "val", "test", "test")[k % 6],
                f"hospital {'ABC'[k % 3]}",
                f"patient-{k:04}",
                ("healthy", "pneumonia")[ill],
                scan if draw.random() > 0.2 else "",
                note if draw.random() > 0.1 else "",
                age, sex, draw.choice(["emergency", "surgery", "internal"]), heat,
                crp if draw.random() > 0.3 else "NA",
            ])  # fmt: skip
    return path


def write_sentiment(folder: Path, speakers: int = 16) -> Path:
    """Features of utterances made elsewhere: a vector of the words, one of the voice, a series of
    the face. The target is from -3 to 3; nobody speaks in two splits."""
    draw = np.random.default_rng(4)
    for name in ("words", "voice", "face"):
        (folder / name).mkdir(parents=True)
    ways = [draw.standard_normal(n) for n in (50, 20, 10)]
    path = folder / "manifest.jsonl"
    path.unlink(missing_ok=True)
    lines = []
    for speaker in range(speakers):
        split = "train" if speaker % 4 < 2 else ("dev", "test")[speaker % 2]
        accent = 0.5 * draw.standard_normal(20)
        for turn in range(6):
            name = f"s{speaker:02}-{turn}"
            mood = float(np.clip(draw.normal(0, 1.5), -3, 3))
            arrays = {
                "words": mood * ways[0] + draw.standard_normal(50),
                "voice": (mood * ways[1] + draw.standard_normal(20) + accent)[None],  # (1, 20)
                "face": mood * ways[2] + draw.standard_normal((int(draw.integers(4, 15)), 10)),
            }
            for part, array in arrays.items():
                np.save(folder / part / f"{name}.npy", array)
            cells = {part: f"{part}/{name}.npy" for part in arrays}
            if turn == 3:
                del cells["face"]
            lines.append(
                {"id": name, "split": split, "client": f"site{speaker % 2}",
                 "subject": f"speaker {speaker}", "target": round(mood, 3), **cells}
            )  # fmt: skip
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    (folder / "dataset.toml").write_text('task = "regression"\ntarget_range = [-3, 3]\n')
    return path
