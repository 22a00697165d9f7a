"""How a chart becomes a file that a repository can hold."""

from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from grand_fast.training.checkpoint import write_file

COLOURS = 256  # of the palette, a quarter of the bytes; a chart has fewer, a photograph more


def save_chart(figure: Figure, path: Path) -> None:
    """Write `figure` as a PNG with a palette, making the folder if it is missing."""
    drawn = BytesIO()
    figure.savefig(drawn, dpi=100, format="png")
    picture = BytesIO()
    Image.open(drawn).convert("RGB").quantize(COLOURS).save(picture, format="png", optimize=True)
    write_file(path, picture.getvalue())
