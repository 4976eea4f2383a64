"""Reads the options of a run from the command line and from a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

import yaml

from ..options import OptionParser, kind_of
from ..paths import local_path
from .config import GROUPS, TrainingConfig


_KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text, in quotes if it looks like something else",
    list[str]: "a list of texts",
}


def parse_training_config(arguments: Sequence[str] | None = None) -> TrainingConfig:
    """Reads the command line: flags, or a `.json` or `.yaml` file of options and flags that override it.

    Args:
        arguments: the command line; by default that of this process.

    Raises:
        ValueError: if the file holds anything but options, or a value is of another type than its option, none of
            its choices or outside of its bounds.
        OSError: if the file cannot be read.
    """
    parser = OptionParser(GROUPS)
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0].startswith("-") or not arguments[0].endswith((".json", ".yaml", ".yml")):
        return TrainingConfig(*parser.parse_args_into_dataclasses(arguments))
    file, *flags = arguments
    options = _read_options(local_path(file))
    if base := options.pop("pretrained_model_name_or_path", None):  # argparse wants it as a flag
        flags = [f"--pretrained_model_name_or_path={base}", *flags]
    parser.set_defaults(**options)
    return TrainingConfig(*parser.parse_args_into_dataclasses(flags))


def _read_options(file: Path) -> dict[str, Any]:
    """Options from a file, each of its type.

    `HfArgumentParser.parse_yaml_file` takes no flags besides the file, checks no types and leaves `1e-4` as text.

    Raises:
        ValueError: if the file holds no options, or ones that do not exist or are of another type.
    """
    try:
        options = (json.loads if file.suffix == ".json" else yaml.safe_load)(file.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file} is no valid {file.suffix[1:].upper()}: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{file} holds no options; write each as `name: value`, such as `train_data_dir: photos`.")
    annotations = {name: annotation for group in GROUPS for name, annotation in get_type_hints(group).items()}
    for name in options:
        if name not in annotations:
            near = get_close_matches(str(name), annotations, n=1)
            hint = f"did you mean `{near[0]}`?" if near else "`--help` lists all."
            raise ValueError(f"{file}: there is no option `{name}`; {hint}")
    try:
        return {name: _typed(name, value, annotations[name]) for name, value in options.items()}
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _typed(name: str, value: Any, annotation: Any) -> Any:
    """The value of an option in a file.

    Raises:
        ValueError: if it is not of its option's type.
    """
    kind = kind_of(annotation)
    if value is None and kind != annotation:
        return None
    if get_origin(kind) is Literal:
        kind = str
    if kind == list[str]:
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            return texts
    elif type(value) is kind:
        return value
    elif kind is float and type(value) is int:
        return float(value)
    elif kind in (int, float) and isinstance(value, str):  # YAML reads `1e-4`, without a dot, as text
        with suppress(ValueError):
            return kind(value)
    raise ValueError(f"`{name}` is {value!r}; give {_KINDS[kind]}.")
