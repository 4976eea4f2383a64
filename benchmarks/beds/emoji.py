"""Emoji drawings of people and hands: one file per vendor, gender and skin tone.

Drawings and their names come from the npm packages `emoji-datasource-VENDOR` (names and code points: MIT). Of the
drawings, google's (Noto Emoji) are under Apache-2.0 and twitter's (Twemoji) under CC BY 4.0.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


VERSION = "16.0.0"
# sha512 as the registry has it
INTEGRITY = {
    "google": "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
    "twitter": "7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
}
TONES = ("default", "light", "medium-light", "medium", "medium-dark", "dark")
GENDERS = ("man", "woman")

_TONE_CODES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")
_GENDER_CODES = {"1F468": "man", "1F469": "woman", "2642": "man", "2640": "woman"}
# men and women who differ in more than a gender sign, or have no counterpart
_OTHER_GENDERS = {
    **dict.fromkeys(("boy", "santa", "prince", "man_dancing", "older_man", "pregnant_man"), "man"),
    **dict.fromkeys(("girl", "mrs_claus", "princess", "dancer", "older_woman", "pregnant_woman"), "woman"),
}
_FACES_RIGHT = "27A1"
_NOUNS = ("person-role", "person-fantasy")


@dataclass(frozen=True)
class Drawing:
    """One drawing of a person, a hand or another part of the body.

    Attributes:
        file: in its vendor's package.
        role: what men, women and people of unnamed gender who are drawn alike have in common; its code points.
        phrase: the role in words, such as "a firefighter".
        gender: of `GENDERS`; `None` if it is none of them.
        tone: of the skin, a number in `TONES`.
    """

    file: str
    role: str
    phrase: str
    gender: str | None
    tone: int


def fetch(vendor: str, cache_dir: Path) -> Path:
    """A vendor's package, fetched with `npm pack` unless `cache_dir` has it.

    Raises:
        FileNotFoundError: if there is no npm.
        subprocess.CalledProcessError: if npm fails.
        ValueError: if the file is not the one that the benchmark was made with.
    """
    name = f"emoji-datasource-{vendor}"
    file = cache_dir / f"{name}-{VERSION}.tgz"
    if not file.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", f"{name}@{VERSION}", "--silent", "--pack-destination", str(cache_dir)]
        try:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        except FileNotFoundError as error:
            message = f"npm is not installed. Install Node.js, or put {file.name} in {cache_dir}."
            raise FileNotFoundError(message) from error
    digest = base64.b64encode(hashlib.sha512(file.read_bytes()).digest()).decode()
    if digest != INTEGRITY[vendor]:
        raise ValueError(f"{file} is damaged, or another package. Delete it to fetch it again.")
    return file


def read_package(file: Path, vendor: str) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """What `emoji.json` says of each emoji, and the PNG files of 64 pixels by name."""
    names, drawings = [], {}
    with tarfile.open(file) as archive:
        for member in archive:
            file_name, content = Path(member.name), archive.extractfile(member)
            if content is None:  # a folder
                continue
            if member.name == "package/emoji.json":
                names = json.load(content)
            elif file_name.match(f"img/{vendor}/64/*.png"):
                drawings[file_name.name] = content.read()
    return names, drawings


def people(names: list[dict[str, Any]]) -> Iterator[Drawing]:
    """All drawings with one skin, in all tones.

    Those that face right are left out: they mirror others.
    """
    for entry in names:
        variations = entry.get("skin_variations", {})
        codes = entry["unified"].split("-")
        if set(variations) != set(_TONE_CODES) or _FACES_RIGHT in codes:
            continue
        role, gender = _role(codes)
        gender = gender or _OTHER_GENDERS.get(entry["short_name"])
        phrase = _phrase(entry)
        for tone, version in enumerate([entry, *(variations[code] for code in _TONE_CODES)]):
            yield Drawing(version["image"], role, phrase, gender, tone)


def things(names: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """The file and the name, with an article, of every emoji that shows neither people nor parts of them."""
    for entry in names:
        if entry["category"] not in ("People & Body", "Component") and not entry.get("skin_variations"):
            yield entry["image"], _with_article(entry["name"].lower())


def decode(png: bytes) -> np.ndarray:
    """A drawing on white, (64, 64, 3) uint8."""
    drawing = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", drawing.size, "white")
    return np.asarray(Image.alpha_composite(white, drawing).convert("RGB"))


def _role(codes: list[str]) -> tuple[str, str | None]:
    """The code points without what says the gender, and that gender.

    Unicode has two ways: MAN or WOMAN in place of PERSON, or a gender sign after a joiner.
    """
    genders = {_GENDER_CODES[code] for code in codes if code in _GENDER_CODES}
    if not genders:
        return "-".join(codes), None
    (gender,) = genders
    if codes[0] in _GENDER_CODES:
        return "-".join(["1F9D1", *codes[1:]]), gender
    return re.sub("-200D-26(40|42)-FE0F", "", "-".join(codes)), gender


def _phrase(entry: dict[str, Any]) -> str:
    """An emoji's name with an article and without a gender: "a person walking", "an astronaut", "a deaf person"."""
    name = re.sub(r"\b(wo)?man\b", "person", entry["name"].lower()).replace("merman", "merperson")
    name = re.sub("person: ", "person with ", name.replace("person: bald", "bald person"))
    if entry["subcategory"] in _NOUNS:
        name = re.sub(r"^person (?!with |in |wearing |feeding )", "", name)
    return _with_article(name)


def _with_article(name: str) -> str:
    return ("an " if name[0] in "aeiou" else "a ") + name
