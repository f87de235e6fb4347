"""Boxes around objects, read from annotations in the form of PASCAL VOC.

ImageNet keeps one XML file an image, with the size of the image and a box for
each object of its class.
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np

from saccade.data import formats

_XML_BYTES = 2**20  # ImageNet's largest annotation has 2**14.

_BROKEN = (
    *(OSError, SyntaxError, TypeError, ValueError, ZeroDivisionError),
    expat.ExpatError,
)


def find_folder(folders: Sequence[pathlib.Path]) -> pathlib.Path | None:
    """Returns the first folder of annotations beside or above images, or None.

    Args:
        folders: Paths of folders that may hold `Annotations/`, or
            `Annotations/CLS-LOC/` as on Kaggle.
    """
    places = ("Annotations/CLS-LOC", "Annotations")
    found = (folder / place for folder in folders for place in places)
    return next((path for path in found if path.is_dir()), None)


def annotated(
    paths: Sequence[str],
    labels: Sequence[int],
    folders: Sequence[pathlib.Path],
) -> tuple[list[str], list[int], list[str]]:
    """Keeps the images that have an annotation.

    Args:
        paths: Paths of the images.
        labels: Class ids, one a path.
        folders: Folders that may hold `<stem>.xml`, or `<class>/<stem>.xml`
            with the class folder of the image.

    Returns:
        `(paths, labels, annotations)`, lists, of the images that have one.
    """
    kept: tuple[list[str], list[int], list[str]] = [], [], []
    for path, label in zip(paths, labels, strict=True):
        parent, name = os.path.split(path)
        name = f"{os.path.splitext(name)[0]}.xml"
        found = (
            os.path.join(folder, place, name)
            for folder in folders
            for place in (os.path.basename(parent), "")
        )
        annotation = next(filter(os.path.isfile, found), None)
        if annotation is not None:
            kept[0].append(path)
            kept[1].append(label)
            kept[2].append(annotation)
    return kept


def read_largest(path: str | pathlib.Path) -> tuple[float, float, float, float]:
    """Reads the largest box of an annotation.

    Args:
        path: The XML file. Corners are in pixels, edge to edge: `xmax` may be
            the width itself. What sticks out of the image is cut off.

    Returns:
        Tuple (top, left, bottom, right) as fractions of the image.

    Raises:
        ValueError: If the file is no annotation, or has no box of any size
            inside the image.
    """
    try:
        root = _parse(path)
        height, width = (
            float(root.findtext(f"size/{name}", ""))
            for name in ("height", "width")
        )
        corners = [
            [
                float(box.findtext(n, ""))
                for n in ("ymin", "xmin", "ymax", "xmax")
            ]
            for box in root.iter("bndbox")
        ]
        scale = np.array([height, width, height, width])
        if not np.all(scale > 0):
            raise ValueError(f"a size of {width:g}x{height:g} pixels")
    except _BROKEN as error:
        raise ValueError(f"no annotation in {path}: {error}") from None
    boxes = np.clip(np.reshape(corners, (-1, 4)) / scale, 0.0, 1.0)
    areas = np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0.0), axis=1)
    if not np.any(areas > 0):
        raise ValueError(f"no box inside the image in {path}")
    top, left, bottom, right = boxes[np.nanargmax(areas)].tolist()
    return top, left, bottom, right


def _parse(path: str | pathlib.Path) -> ElementTree.Element:
    """Reads a small XML file that declares no entities, which can explode."""
    formats.require_file(path, _XML_BYTES)
    content = pathlib.Path(path).read_bytes()

    def refuse(*_: Any) -> None:
        raise ValueError("it declares entities")

    parser = expat.ParserCreate()
    parser.EntityDeclHandler = refuse
    parser.Parse(content, True)
    return ElementTree.fromstring(content)
