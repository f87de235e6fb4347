"""ImageNet's files: WordNet ids, class lists and validation labels."""

import collections
import hashlib
import io
import os
import pathlib
import re
from collections.abc import Callable, Collection, Sequence

from saccade.core import run_folder
from saccade.data import folders as class_folders
from saccade.data import formats

CLASS_LISTS = pathlib.Path(__file__).resolve().parent / "class_lists"
_WNID = re.compile(r"n\d{8}")
_LIST_BYTES = 2**24  # ImageNet's 1.3 million names would not fit; 50,000 do.
_MAT_BYTES = 2**26  # What a MATLAB file may unpack to.


# ---------------------------------------------------------------------------
# WordNet ids, and validation folders with a list of their classes


def read_wnids(path: str | pathlib.Path) -> dict[str, str]:
    """Reads a class list.

    Args:
        path: Text file of lines `<wnid>` or `<wnid><tab or space><names>`;
            empty lines and lines that begin with # are passed over.

    Returns:
        Dictionary from wnid to names (`""` where there are none), in order.

    Raises:
        ValueError: If a line does not begin with a wnid, or names one again,
            or there is none.
    """
    text = formats.read_text(path, _LIST_BYTES)
    listed: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        wnid, *rest = line.split(maxsplit=1) or ["#"]
        if wnid.startswith("#"):
            continue
        if not _WNID.fullmatch(wnid):
            # What it is instead is not quoted: it can be any file.
            raise ValueError(
                f"Expected a wnid like n01440764 in each line of {path}. "
                f"Received: something else in line {number}"
            )
        if wnid in listed:
            raise ValueError(
                f"Expected each wnid once in the class list {path}. Received: "
                f"{wnid} twice."
            )
        listed[wnid] = rest[0].strip() if rest else ""
    if not listed:
        raise ValueError(
            f"Expected a wnid like n01440764 in each line of {path}. Received: "
            "a list that names no wnid."
        )
    return listed


def class_list(
    path: str | pathlib.Path, names_path: pathlib.Path
) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, str]]:
    """Reads a class list, in the order of the class ids: sorted by wnid.

    Args:
        path: As for `read_wnids`.
        names_path: Another list, which has the names.

    Returns:
        `(wnids, class_names, record)`: two tuples, and `{"name", "sha256"}`,
        the hash being that of the sorted wnids, one a line.

    Raises:
        ValueError: As `read_wnids`.
    """
    wnids = tuple(sorted(read_wnids(path)))
    known = read_wnids(names_path)
    short = [known.get(w, w).split(",")[0].strip() or w for w in wnids]
    twice = {n for n, k in collections.Counter(short).items() if k > 1}
    class_names = tuple(
        f"{name} ({wnid})" if name in twice else name
        for name, wnid in zip(short, wnids, strict=True)
    )
    digest = hashlib.sha256("".join(f"{w}\n" for w in wnids).encode())
    record = {"name": pathlib.Path(path).stem, "sha256": digest.hexdigest()}
    return wnids, class_names, record


def wnid_files(
    folder: pathlib.Path,
    wnids: Sequence[str],
    places: Sequence[pathlib.Path],
    scan: Callable[[str], class_folders.Scan] = class_folders.scan,
) -> tuple[list[str], list[int]]:
    """Lists a folder of images, by class or flat with its ground truth.

    Args:
        folder: Path of `<wnid>/*`, or of the images themselves.
        wnids: Those wanted, in the order of the class ids.
        places: Folders in which the ground truth of a flat folder may lie.
        scan: As for `folders.class_files`.

    Returns:
        `(paths, labels)`: a path and a class id for each file.

    Raises:
        ValueError: If a class folder is missing or empty, or the images and
            their list differ.
        FileNotFoundError: If a flat folder has no list.
    """
    found = scan(str(folder))
    if any(map(_WNID.fullmatch, found.folders)):
        return class_folders.class_files(folder, wnids, scan)
    files = {
        pathlib.Path(name).stem: name
        for name in found.files
        if not name.lower().endswith((".txt", ".csv", ".mat"))
    }
    if not files:
        raise ValueError(
            f"Expected class folders or images in {folder}. Received: a folder "
            "with neither."
        )
    truth = _truth(folder, files, places)
    absent = sorted(truth.keys() - files) or sorted(files - truth.keys())
    if absent:
        raise ValueError(
            f"Expected the images of {folder} to be those in their list. "
            f"Received: {len(files)} images and {len(truth)} listed ones, "
            f"which differ by {class_folders.some(absent)}."
        )
    ids = {wnid: label for label, wnid in enumerate(wnids)}
    chosen = [stem for stem in sorted(files) if truth[stem] in ids]
    paths = [os.path.join(folder, files[stem]) for stem in chosen]
    return paths, [ids[truth[stem]] for stem in chosen]


def _truth(
    folder: pathlib.Path, stems: Collection[str], places: Sequence[pathlib.Path]
) -> dict[str, str]:
    """The wnid of each image of a flat folder, by the stem of its file."""
    official = "ILSVRC2012_validation_ground_truth.txt"

    def first(*names: str) -> pathlib.Path | None:
        paths = (place / name for place in places for name in names)
        return next((path for path in paths if path.is_file()), None)

    listed = first("LOC_val_solution.csv", "val_annotations.txt")
    numbers, meta = first(official), first("meta.mat")
    if listed:
        return _listed_truth(listed)
    if numbers and meta:
        return _official_truth(numbers, meta, stems)
    raise FileNotFoundError(
        f"Expected the ground truth of {folder}, since it has no class "
        "folders. Received: none. Put LOC_val_solution.csv, or "
        "val_annotations.txt with a line '<file> <wnid>' for each image, or "
        f"{official} together with meta.mat of the development kit, into "
        f"{folder.parent}."
    )


def _listed_truth(path: pathlib.Path) -> dict[str, str]:
    """Reads `<file> <wnid> ...` lines, also comma separated, with a head."""
    truth = {}
    lines = formats.read_text(path, _LIST_BYTES).splitlines()
    for number, line in enumerate(lines, 1):
        words = line.replace(",", " ").split()
        if len(words) > 1 and _WNID.fullmatch(words[1]):
            truth[pathlib.PurePath(words[0]).stem] = words[1]
        elif words and words[0] != "ImageId":
            raise ValueError(
                f"Expected lines '<file> <wnid>' in {path}. Received: "
                f"something else in line {number}"
            )
    return truth


def _official_truth(
    path: pathlib.Path, meta: pathlib.Path, stems: Collection[str]
) -> dict[str, str]:
    """The development kit numbers the classes in an order of its own."""
    import scipy.io

    try:
        content = io.BytesIO(formats.read_mat(meta, _MAT_BYTES))
        synsets = scipy.io.loadmat(content, squeeze_me=True)["synsets"]
        wnids = {
            int(number): str(wnid)
            for number, wnid in zip(
                synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True
            )
        }
    except Exception as error:  # SciPy raises many kinds.
        reason = run_folder.first_line(error)
        raise ValueError(
            f"Expected synsets with ILSVRC2012_ID and WNID in {meta}. "
            f"Received: {reason}"
        ) from None
    lines = formats.read_text(path, _LIST_BYTES).split()
    if not all(line.isdecimal() and int(line) in wnids for line in lines):
        raise ValueError(
            f"Expected in each line of {path} a class number of {meta}. "
            "Received: something else"
        )
    numbers = [int(line) for line in lines]
    truth = {}
    for stem in stems:
        place = re.search(r"_(\d{8})$", stem)
        if place and 1 <= int(place[1]) <= len(numbers):
            truth[stem] = wnids[numbers[int(place[1]) - 1]]
    return truth
