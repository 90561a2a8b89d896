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
