"""A folder with one sub-folder of images per context."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value

from ..context.names import normal_name
from ..paths import local_path
from .contexts import listed
from .encoded_images import RGBImage
from .folder_captions import check_root, read_captions
from .folder_scan import METADATA, scan_root, warn_of_passed_over


_DATA_FILES = {".parquet", ".arrow", ".tar"}  # the formats of `datasets.load_dataset`


def is_context_root(source: Any, obs_context: str = "obs") -> bool:
    """Whether `source` is a folder of contexts, and not one that `datasets.load_dataset` reads.

    It is one if it has images of the observational context, or no data files. Warns of data files that decide it.
    """
    if not isinstance(source, str | Path) or not local_path(source).is_dir():
        return False
    root = local_path(source)
    data = next((path for path in root.rglob("*") if _is_data(path)), None)
    if data is None:
        return True
    with_images = [normal_name(folder.name) for folder, found in scan_root(root)[0].items() if found.images]
    if with_images and normal_name(obs_context) not in with_images:
        warnings.warn(
            f"{root} is read as a dataset because of {data.relative_to(root)}, and not as folders of contexts: it has"
            f" no images of {obs_context!r}.",
            stacklevel=3,
        )
    return normal_name(obs_context) in with_images


def _is_data(path: Path) -> bool:
    return path.suffix.lower() in _DATA_FILES and path.name.lower() not in METADATA and path.is_file()


class ContextFolders:
    """A folder of contexts: its sub-folders by context.

    Args:
        root: the folder.
        output_dir: where a run writes; it is no context, should it lie in `root`.

    Raises:
        ValueError: if images or metadata files lie outside of the sub-folders, a name is no UTF-8, two folders have
            the same name, or `output_dir` has images of the user's.
    """

    def __init__(self, root: str | Path, output_dir: str | Path | None = None):
        self.root = root = local_path(root)
        self._found, self._beside = scan_root(root, None if output_dir is None else local_path(output_dir))
        if self._beside.images:
            raise ValueError(
                f"Images lie directly in {root}, so their context is unknown:"
                f" {listed([path.name for path in self._beside.images])}. Move each into a sub-folder named after its"
                " context, such as 'obs'."
            )
        check_root(self._beside.captions)
        self.folders: dict[str, Path] = {}
        for folder in self._found:
            if self.folders.setdefault(name := normal_name(folder.name), folder) != folder:
                raise ValueError(f"Two folders in {root} have the name {name!r}, in two Unicode forms; merge them.")

    @property
    def contexts(self) -> list[str]:
        """The names of the contexts, sorted."""
        return sorted(self.folders)

    def read(self, contexts: list[str], text_column: str) -> Dataset:
        """The images of these contexts, sorted by name, and their captions; says in one line what is passed over.

        `datasets.load_dataset("imagefolder", data_dir=...)` is not used, also not for each context alone: it drops
        images that a metadata file does not name, takes file names like `train_1.jpg` and `test_1.png` for splits and
        drops all other images, and takes a caption with a comma for two columns.

        Raises:
            ValueError: if a folder has no images or a wrong metadata file; see `read_captions`.
        """
        columns: dict[str, list[str]] = {"image": [], "context": [], "text": []}
        passed_over = list(self._beside.passed_over)
        for context in contexts:
            folder = self.folders[context]
            found = self._found[folder]
            if not found.images:
                warn_of_passed_over(self.root, found.passed_over, stacklevel=3)
                raise ValueError(f"The folder {folder} holds no images; put the context's images there or remove it.")
            captions = read_captions(folder, found, text_column)
            columns["image"] += map(str, found.images)
            columns["context"] += [context] * len(found.images)
            columns["text"] += [captions.get(image, "") for image in found.images]
            passed_over += found.passed_over
        warn_of_passed_over(self.root, passed_over, stacklevel=3)
        features = Features({"image": RGBImage(), "context": Value("string"), "text": Value("string")})
        return Dataset.from_dict(columns, features=features)
