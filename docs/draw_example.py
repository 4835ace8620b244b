"""Draws docs/example.png from what `make demo` has left in demo/: `python -m docs.draw_example`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from raysseg import Predictor
from raysseg.data.decode import decode_image
from raysseg.masks import decode_id_map, to_indices
from raysseg.report import paint_labels

SCENES = ("0018", "0039", "0004")


def main() -> None:
    """One row a scene: image, ground truth, prediction."""
    predictor = Predictor("demo/bundle")
    classes = predictor.bundle.classes
    rows = []
    for scene in SCENES:
        image = decode_image(Path(f"demo/data/val/images/{scene}.jpg").read_bytes())
        truth = to_indices(decode_id_map(Path(f"demo/data/val/masks/{scene}.png").read_bytes(), classes), classes)
        (found,) = predictor.predict([image])
        rows.append(np.hstack([image, *(paint_labels(image, labels, classes) for labels in (truth, found.labels))]))
    Image.fromarray(np.vstack(rows)).save("docs/example.png", optimize=True)


if __name__ == "__main__":
    main()
