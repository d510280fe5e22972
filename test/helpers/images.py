# SPDX-License-Identifier: BSD-3-Clause
"""Small datasets of generated images."""

from __future__ import annotations

import io
import os
import pickle
from typing import Any

import numpy as np
from PIL import Image


def photo(width: int, height: int, seed: int) -> np.ndarray:
    """An image with structure at every scale, as photos have: (H, W, 3) uint8."""
    rng = np.random.RandomState(seed)
    total = np.zeros((height, width, 3), np.float32)
    for cells in (3, 9, 27, 81):
        noise = Image.fromarray(rng.randint(0, 256, (cells, cells, 3)).astype(np.uint8))
        total += np.asarray(noise.resize((width, height), Image.BICUBIC), np.float32) / cells
    total -= total.min()
    return (total / total.max() * 255).astype(np.uint8)


def jpeg(width: int, height: int, seed: int, mode: str = "RGB", **options: Any) -> bytes:
    """The bytes of a JPEG."""
    content = io.BytesIO()
    Image.fromarray(photo(width, height, seed)).convert(mode).save(content, "JPEG", **options)
    return content.getvalue()


def make_folder(root: Any, classes: int = 3, train: int = 8, val: int = 5, size: tuple[int, int] = (96, 72)) -> str:
    """ROOT/train and ROOT/val with JPEGs. Each class has a color of its own, so that it can be learned."""
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = os.path.join(str(root), split, f"class {label}")
            os.makedirs(folder)
            for number in range(count):
                seed = label * 1000 + number + 500 * (split == "val")
                pixels = photo(size[0] + number % 3, size[1] + number % 2, seed)
                pixels[..., label % 3] = 255 - pixels[..., label % 3] // 4
                Image.fromarray(pixels).save(os.path.join(folder, f"图 {number:03d}.JPEG"), quality=90)
    return str(root)


def write_cifar(root: Any, binary: bool, count: int = 40, classes: int = 10) -> dict[str, tuple[np.ndarray, list[int]]]:
    """A folder in the format of CIFAR-10 or CIFAR-100, `count` images per file. Returns {file: (pixels, labels)}."""
    os.makedirs(str(root), exist_ok=True)
    expected = {}
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"] if classes == 10 else ["train", "test"]
    for number, name in enumerate(names):
        images = [photo(32, 32, 100 * number + i).transpose(2, 0, 1).reshape(-1) for i in range(count)]
        pixels, labels = np.stack(images), [(i * 7 + number) % classes for i in range(count)]
        columns = [np.array(labels, np.uint8)[:, None], pixels]
        record: dict[bytes, Any] = {b"batch_label": b"x", b"data": pixels, b"filenames": [b"a.png"] * count}
        if classes == 10:
            record[b"labels"] = labels
        else:
            coarse = [label // 5 for label in labels]
            columns.insert(0, np.array(coarse, np.uint8)[:, None])
            record.update({b"coarse_labels": coarse, b"fine_labels": labels})
        path = os.path.join(str(root), name)
        if binary:
            with open(f"{path}.bin", "wb") as file:
                file.write(np.concatenate(columns, axis=1).tobytes())
        else:
            with open(path, "wb") as file:
                pickle.dump(record, file, protocol=2)
        expected[name] = pixels, labels
    if classes == 100:
        fine = [b"class_%d" % label for label in range(100)]
        with open(os.path.join(str(root), "fine_label_names.txt" if binary else "meta"), "wb") as file:
            file.write(b"\n".join(fine) + b"\n\n" if binary else pickle.dumps({b"fine_label_names": fine}, protocol=2))
    return expected
