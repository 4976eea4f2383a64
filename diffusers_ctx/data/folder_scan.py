"""What lies in a folder of images: pictures, their captions, and what is passed over."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import PIL.Image

from ..adapter_format import CONFIG_NAME, LORA_WEIGHTS_NAME, RECORD_NAME
from .contexts import listed


CAPTION = ".caption"
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")

# Pillow opens these, but has no picture of them
_NO_PICTURES = {".bufr", ".grib", ".h5", ".hdf", ".iim", ".mpeg", ".mpg"}

_HEIC = {".heic", ".heif", ".hif"}
_OTHER_PICTURES = {
    ".3fr", ".arw", ".avif", ".cr2", ".cr3", ".dng", ".erf", ".exr", ".hdr", ".jxl", ".kdc", ".mef", ".mos", ".mrw",
    ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".sr2", ".srf", ".srw", ".svg", ".x3f", ".xcf",
}  # fmt: skip
_TEXTS = {
    ".caption",
    ".csv",
    ".json",
    ".jsonl",
    ".parquet",
    ".tags",
    ".toml",
    ".tsv",
    ".txt",
    ".xlsx",
    ".yaml",
    ".yml",
}

# What other programs leave, and has nothing of the user's
_LEFTOVERS = {".aae", ".db", ".ini", ".lnk", ".thm", ".url"}
_LEFTOVER_FOLDERS = {
    "#recycle", "#snapshot", "$recycle.bin", "@eadir", "@recycle", "@tmp", "__macosx", "__pycache__", "lost+found",
    "system volume information",
}  # fmt: skip
_THUMBNAILS = {"thumb", "thumbnail", "thumbnails", "thumbs"}
_NO_EXTENSION = "file without extension"
_DOCUMENTS = {".html", ".log", ".md", ".pdf", _NO_EXTENSION}  # they may lie beside the contexts' folders

# Whatever has all files of a row is the folder of a run, an evaluation or a model
_RUNS = (
    (CONFIG_NAME,),
    (RECORD_NAME,),
    (LORA_WEIGHTS_NAME,),
    ("model_index.json",),
    ("concepts-in-progress.pt",),
    (".training.lock",),
    ("checkpoint-*/options.json",),
    ("settings.json", "samples"),
    ("latents-*.safetensors",),
)
_RUN = "folder of a run or model"


@dataclass
class FolderScan:
    """The files in a folder and below it.

    Attributes:
        images: those that Pillow can open, sorted.
        captions: the metadata files and text files that captions are read from, sorted.
        passed_over: all others, each with its kind, but for those that are known to be no picture of the user's.
    """

    images: list[Path] = field(default_factory=list)
    captions: list[Path] = field(default_factory=list)
    passed_over: list[tuple[str, Path]] = field(default_factory=list)

    def add(self, file: Path) -> None:
        """Sorts a file in."""
        suffix = file.suffix.lower()
        if file.is_symlink() and not file.exists():
            self.passed_over.append(("broken link", file))
        elif not file.is_file() or file.name.startswith(".") or suffix in _LEFTOVERS:
            return
        elif suffix in image_extensions():
            self.images.append(file)
        elif suffix == CAPTION or file.name.lower() in METADATA:
            self.captions.append(file)
        else:
            self.passed_over.append((suffix or _NO_EXTENSION, file))


def image_extensions() -> set[str]:
    """The extensions of pictures that Pillow can open here, in lower case."""
    return {name for name, kind in PIL.Image.registered_extensions().items() if kind in PIL.Image.OPEN} - _NO_PICTURES


def scan_folder(folder: Path, root: Path, output_dir: Path | None = None) -> FolderScan:
    """Sorts all files in a folder and below. Linked folders are followed, each once.

    Args:
        folder: the folder of a context.
        root: the folder of all contexts; links to it or above are not followed.
        output_dir: where a run writes, which is passed over.

    Raises:
        ValueError: if the name of an image is no UTF-8, or `output_dir` lies in it and has images of the user's.
    """
    found = FolderScan()
    followed = {root.resolve(), *root.resolve().parents, folder.resolve()}
    pending = [folder]
    while pending:
        # a folder before links to it, which are known by its name
        for path in sorted(pending.pop().iterdir(), key=lambda path: (path.is_symlink(), path)):
            if not path.is_dir():
                found.add(path)
            elif not _is_of_user(path, output_dir, found):
                continue
            elif path.resolve() in followed:
                found.passed_over.append(("link to what is read already", path))
            else:
                followed.add(path.resolve())
                pending.append(path)
    found.images.sort()
    found.captions.sort()
    check_names(found.images)
    return found


def scan_root(root: Path, output_dir: Path | None = None) -> tuple[dict[Path, FolderScan], FolderScan]:
    """The contexts' folders with what is in them, and what lies beside them; see `scan_folder`.

    Raises:
        ValueError: if the name of a folder is no UTF-8, or `output_dir` is `root` or a folder of images.
    """
    if output_dir is not None and output_dir.resolve() == root.resolve():
        raise ValueError(_mixed(output_dir))
    folders: dict[Path, FolderScan] = {}
    beside = FolderScan()
    for path in sorted(root.iterdir()):
        if not path.is_dir():
            beside.add(path)
        elif _is_of_user(path, output_dir, beside):
            found = scan_folder(path, root, output_dir)
            if _holds_runs(path, found, output_dir):
                beside.passed_over.append((_RUN, path))
            else:
                folders[path] = found
    beside.passed_over = [(kind, path) for kind, path in beside.passed_over if kind not in _DOCUMENTS]
    check_names(list(folders))
    return folders, beside


def warn_of_passed_over(root: Path, passed_over: list[tuple[str, Path]], stacklevel: int = 2) -> None:
    """Says in one line what is passed over, by kind and with an example of each; nothing if nothing is."""
    if not passed_over:
        return
    counts, examples = Counter(kind for kind, _ in passed_over), dict(reversed(passed_over))
    kinds = [
        f"{count} {_plural(kind, count)} ({_shown(examples[kind].relative_to(root))})"
        for kind, count in counts.most_common()
    ]
    warnings.warn(f"Passed over in {root}: {listed(kinds)}.{_hint(set(counts))}", stacklevel=stacklevel + 1)


def check_names(paths: list[Path]) -> None:
    """Checks that names are UTF-8.

    Raises:
        ValueError: naming those that are not.
    """
    wrong = [path for path in paths if not _is_utf8(path)]
    if wrong:
        raise ValueError(f"These names are no UTF-8: {listed(list(map(_shown, wrong)))}; rename the files or folders.")


def _is_of_user(folder: Path, output_dir: Path | None, found: FolderScan) -> bool:
    """Whether a folder may hold photos; notes in `found` why not, where that is worth saying."""
    name = folder.name.lower()
    is_run = any(all(any(folder.glob(file)) for file in files) for files in _RUNS)
    if output_dir is not None and folder.resolve() == output_dir.resolve():
        if not is_run and any(path.suffix.lower() in image_extensions() for path in folder.iterdir()):
            raise ValueError(_mixed(output_dir))
        return False
    if name.startswith(".") or name in _LEFTOVER_FOLDERS:
        return False
    if is_run:
        kind = _RUN
    elif name.strip("_") in _THUMBNAILS:
        kind = "folder of thumbnails"
    elif name.startswith("__"):
        kind = "hidden folder"
    else:
        return True
    found.passed_over.append((kind, folder))
    return False


def _holds_runs(folder: Path, found: FolderScan, output_dir: Path | None) -> bool:
    """Whether a folder has no images but those of runs, or the output of this one to be."""
    is_parent = output_dir is not None and folder.resolve() in output_dir.resolve().parents
    return not found.images and (is_parent or any(kind == _RUN for kind, _ in found.passed_over))


def _mixed(output_dir: Path) -> str:
    return f"`output_dir` {output_dir} holds the images to train on; give what the run writes a folder of its own."


def _plural(kind: str, count: int) -> str:
    if count == 1 or kind.startswith("."):
        return kind
    for noun in ("file", "folder", "link"):
        kind = kind.replace(noun, f"{noun}s")
    return kind


def _hint(kinds: set[str]) -> str:
    hints = []
    if kinds & _HEIC:
        hints.append("`pip install pillow-heif` reads HEIC")
    if kinds & _OTHER_PICTURES:
        hints.append("convert other pictures to JPEG or PNG")
    if kinds & _TEXTS:
        hints.append(f"captions are read from {', '.join(METADATA)} (file_name,text) and image{CAPTION}")
    return f" To use them: {'; '.join(hints)}." if hints else ""


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(path: Path) -> str:
    """The path in a form that can be printed: bytes that are no UTF-8 as `\\xe9`."""
    return str(path).encode(errors="surrogateescape").decode(errors="backslashreplace")
