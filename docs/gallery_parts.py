"""What sphinx-gallery needs to run the examples as they are: scripts that save one picture each."""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx_gallery.scrapers import figure_rst

EXAMPLES = Path(__file__).parents[1] / "examples"


def saved_pictures(block: tuple, block_vars: dict, gallery_conf: dict) -> str:
    """Move the pictures that an example has saved to where the gallery wants them; return the text that shows them."""
    places = []
    for picture in sorted(Path(block_vars["src_file"]).parent.glob("*.png")):
        target = Path(next(block_vars["image_path_iterator"]))
        picture.replace(target)
        places.append(str(target))
    return figure_rst(places, gallery_conf["src_dir"])


def fresh_modules(gallery_conf: dict, name: str) -> None:
    """Let each example import its helpers as in a process of its own."""
    sys.modules.pop("networks", None)
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))


# From the first question of a newcomer to the last one; what is not named comes at the end.
READING_ORDER = (
    "digits",
    "initialization",
    "gradient_norms",
    "drift",
    "generalization",
    "batch_sizes",
    "online",
    "sequences",
    "convolution",
    "camera",
    "volumes",
    "transformer",
    "accumulation",
    "standardize",
    "step_share",
)


class ReadingOrder:
    """Sort key of the gallery."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self, file: str) -> tuple[int, str]:
        """Place of an example."""
        name = Path(file).stem
        return (READING_ORDER.index(name) if name in READING_ORDER else len(READING_ORDER)), name
