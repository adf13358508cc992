"""Small files of samples, as a user may have them: a table, arrays, images and texts, of two classes each."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def write_samples(place: Path) -> None:
    """Writes `rows.csv` (columns a, b, y), `arrays.npz` (x, y), the folder `images`, and texts into a folder."""
    from PIL import Image

    write_texts(place)

    draw = np.random.default_rng(0)
    numbers, pixels = draw.random((40, 2)), draw.integers(0, 256, (40, 8, 8), dtype=np.uint8)
    rows = [f"{a:.4f},{b:.4f},{'cat' if i % 2 else 'dog'}" for i, (a, b) in enumerate(numbers)]
    (place / "rows.csv").write_text("\n".join(["a,b,y", *rows, ""]))
    np.savez(place / "arrays.npz", x=pixels, y=np.arange(40) % 2)
    for label in ("cat", "dog"):
        (place / "images" / label).mkdir(parents=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(place / "images" / ("cat" if i % 2 else "dog") / f"{i}.png")


def write_texts(place: Path) -> None:
    """Writes `texts.jsonl` (text, label), and the folders `saved` (of Hugging Face) and `poems` (of npm)."""
    import pyarrow as pa

    rows = [{"text": f"{'cats and' if i % 2 else 'dogs or'} {i} others " * 4, "label": i % 2} for i in range(80)]
    (place / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "saved").mkdir()
    (place / "saved/state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(str(place / "saved/data-00000-of-00001.arrow"), table.schema) as stream:
        stream.write_table(table)
    (place / "poems/dist/quantangshi").mkdir(parents=True)
    poems = [{"title": f"詩 {i}", "author": "李白", "paragraphs": ["秦川雄帝宅，函谷壯皇居。"] * 3} for i in range(80)]
    (place / "poems/dist/quantangshi/poet.tang.0.json").write_text(json.dumps(poems), encoding="utf-8")
