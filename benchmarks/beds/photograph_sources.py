"""Real photographs by day, out of doors, from Debian's package gcompris-qt-data.

The package (44 MB) ships pictures of GCompris, a program for children: among them photographs from Wikimedia Commons,
in the public domain or under CC0, CC BY (1.0, 2.0), CC BY-SA (2.0, 3.0, 4.0) and in one case (windmill6) GPL-2+.
The file `copyright` in its folder of documents names author and license of those under `categorization`; the file
README within `explore_monuments.rcc` those of the others. None of them is a part of this repository.
"""

from __future__ import annotations

import hashlib
import io
import struct
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path


PACKAGE, VERSION = "gcompris-qt-data", "3.1-2"
SHA256 = "e9cf06ab2105529068df73085784e835d2ff03f870d2a8091f09125d40abac9f"
LICENCE = "photographs from Wikimedia Commons: public domain, CC0, CC BY, CC BY-SA (one GPL-2+); see the package"

# What each shows, by hand. Two photographs of one thing are in one set.
TRAINING = {
    "usa/mountRushmore": "carved cliffs",
    "monuments/mountRushmore": "carved cliffs",
    "usa/statueofLiberty": "a statue",
    "monuments/statueOfLiberty": "a statue",
    "usa/cabrillo": "a statue",
    "monuments/christTheRedeemer": "a statue",
    "monuments/victoriaMemorial": "a statue",
    "usa/fortSumter": "ruins",
    "germany/trierImperialBaths": "ruins",
    "usa/navajo": "cliffs",
    "egypt/greatPyramidOfGiza": "a pyramid",
    "wonders/chichenItza": "a pyramid",
    "india/konarkSunTemple": "a temple",
    "india/goldenTemple": "a temple by the water",
    "monuments/monument1": "a temple",
    "wonders/tajMahal": "a palace",
    "monuments/tajMahal": "a palace",
    "india/hawaMahal": "a palace",
    "india/victoriaMemorial": "a palace",
    "france/palaisdesPapes": "a palace",
    "monuments/leMusee": "a palace",
    "india/charminar": "a gate",
    "india/ajantaCave": "a green valley",
    "france/chateaudeChambord": "a castle",
    "france/montStMichel": "a castle on a hill",
    "france/rocamadour": "a castle on a hill",
    "france/reimsCathedral": "a church",
    "monuments/cathedral": "a church",
    "monuments/monument3": "a church",
    "germany/aulaPalatina": "a church",
    "france/eiffelTower": "a tower",
    "monuments/eiffelTower": "a tower",
    "monuments/bayterek": "a tower",
    "monuments/empireState": "a tower",
    "monuments/jucheTower": "a tower",
    "france/arlesAmphitheater": "an amphitheater",
    "wonders/colosseum": "an amphitheater",
    "renewable/windmill": "a windmill",
    "renewable/windmill2": "a windmill",
    "renewable/windmill5": "a windmill",
    "renewable/windmill6": "a windmill",
    "renewable/windmill7": "a windmill",
    "renewable/windmill8": "a windmill",
    "renewable/windmill11": "a windmill",
    "renewable/windmill14": "a windmill",
    "renewable/windmill15": "a windmill",
    "renewable/dam1": "a dam",
    "renewable/dam4": "a dam",
    "renewable/solar4": "solar panels",
    "renewable/solar5": "solar panels",
    "renewable/solar8": "solar panels",
}
# of which the readers learn
READING = {
    "germany/neuschwansteinCastle": "a castle",
    "france/citedeCarcassonne": "a castle",
    "germany/schwerinPalace": "a palace",
    "monuments/usCapitol": "a palace",
    "germany/berlinCathedral": "a church",
    "india/rangGhar": "a temple",
    "wonders/petra": "carved cliffs",
    "wonders/greatWallofChina": "a wall on a hill",
    "monuments/greatWall": "a wall on a hill",
    "monuments/parthenon": "ruins",
    "monuments/IndiaGate": "a gate",
    "monuments/leaningTowerOfPisa": "a tower",
    "renewable/windmill1": "a windmill",
    "renewable/windmill9": "a windmill",
    "renewable/windmill12": "a windmill",
    "renewable/dam2": "a dam",
    "renewable/solar6": "solar panels",
}
HELD_OUT = {
    "france/chateaudeChenonceau": "a castle",
    "france/pontduGard": "a bridge",
    "wonders/machuPicchu": "mountains",
    "india/mysorePalace": "a palace",
    "monuments/operaHouse": "a palace by the water",
    "germany/wormsCathedral": "a church",
    "usa/canyondeChelly": "cliffs",
    "monuments/monument2": "ruins",
    "monuments/arcDeTriomphe": "a gate",
    "india/qutubMinar": "a tower",
    "monuments/kutubMinar": "a tower",
    "egypt/redPyramid": "a pyramid",
    "renewable/windmill3": "a windmill",
    "renewable/windmill4": "a windmill",
    "renewable/windmill13": "a windmill",
    "renewable/dam3": "a dam",
    "renewable/solar7": "solar panels",
}


def fetch(folder: Path) -> Path:
    """A folder of the photographs, `<place>/<name>.webp`, made from the package where it is not there yet.

    Args:
        folder: of sources; the package is there, or `apt-get download` puts it there.

    Raises:
        RuntimeError: if the package is not there and there is no apt-get that has this version of it.
        ValueError: if the package is not the one that is expected.
    """
    photographs = folder / "photographs"
    wanted = {*TRAINING, *READING, *HELD_OUT}
    if all((photographs / f"{name}.webp").exists() for name in wanted):
        return photographs
    package = folder / f"{PACKAGE}_{VERSION}_all.deb"
    folder.mkdir(parents=True, exist_ok=True)
    if not package.exists():
        _download(folder, package)
    digest = hashlib.sha256(package.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(f"{package} has the SHA-256 {digest}, not {SHA256}; delete it and fetch it again.")
    for path, content in _pictures(package):
        name = "/".join(path.removesuffix(".webp").split("/")[-2:])
        if name in wanted:
            file = photographs / f"{name}.webp"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    return photographs


def _download(folder: Path, package: Path) -> None:
    try:
        subprocess.run(["apt-get", "download", f"{PACKAGE}={VERSION}"], cwd=folder, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(
            f"`apt-get download {PACKAGE}={VERSION}` failed; put {package.name} into {folder}. Debian keeps it at"
            f" https://snapshot.debian.org/package/gcompris-qt/{VERSION}/."
        ) from error


def _pictures(package: Path) -> Iterator[tuple[str, bytes]]:
    """Paths and contents of pictures in a Debian package's files of Qt resources."""
    with tarfile.open(fileobj=io.BytesIO(archive_member(package.read_bytes(), "data.tar.xz"))) as files:
        for member in files:
            if member.name.endswith(("/explore_monuments.rcc", "/categorization.rcc")):
                content = files.extractfile(member)
                assert content is not None  # resources are plain files
                yield from (item for item in resources(content.read()) if item[0].endswith(".webp"))


def archive_member(archive: bytes, name: str) -> bytes:
    """Content of a file in an `ar` archive, as Debian's packages are.

    Raises:
        KeyError: if it has no such file.
    """
    start = len(b"!<arch>\n")
    while start < len(archive):
        header = archive[start : start + 60]
        size = int(header[48:58])
        if header[:16].decode().rstrip(" /") == name:
            return archive[start + 60 : start + 60 + size]
        start += 60 + size + size % 2
    raise KeyError(name)


def resources(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Paths and contents of the uncompressed files in Qt's binary resource format (`.rcc`, version 2 and later).

    A tree of nodes of 22 bytes points to names (length, hash, UTF-16) and contents (length, bytes).
    """
    _, _, tree, contents, names = struct.unpack_from(">4sIIII", data)

    def walk(node: int, folder: str) -> Iterator[tuple[str, bytes]]:
        name, flags, first, second = struct.unpack_from(">IHII", data, tree + 22 * node)
        (length,) = struct.unpack_from(">H", data, names + name)
        path = folder + data[names + name + 6 : names + name + 6 + 2 * length].decode("utf-16-be") if node else ""
        if flags & 2:  # a folder of `first` nodes from `second` on
            for child in range(second, second + first):
                yield from walk(child, f"{path}/" if path else "")
        elif not flags:  # of a file, the second number is where its content is
            ((size,), start) = struct.unpack_from(">I", data, contents + second), contents + second + 4
            yield path, data[start : start + size]

    return walk(0, "")
