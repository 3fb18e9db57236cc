"""The index of a webdataset shard: where its images lie and what they show."""

import tarfile
from pathlib import Path
from typing import NamedTuple

from ..errors import DataError

SHARD_SUFFIXES = ("jpg", "jpeg", "png", "webp")


class ShardImage(NamedTuple):
    """One sample of a shard: where the bytes of its image are, and its class."""

    key: str
    offset: int
    size: int
    label: int


def index_shard(path: Path) -> list[ShardImage]:
    """List the samples of an uncompressed tar file, in the order of their images.

    A sample is the files whose names agree up to the first dot: an image (``SHARD_SUFFIXES``) and a ``.cls`` with
    the number of its class as text. Other files are passed over.

    Raises:
        DataError: The file is torn, or a sample lacks its image or class or has two of them.
    """
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, bytes] = {}
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as shard:
            for member in shard:
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.lower().partition(".")
                if not member.isfile() or not stem or suffix not in (*SHARD_SUFFIXES, "cls"):
                    continue
                key = f"{folder}/{name[: len(stem)]}".removeprefix("/")
                if key in (labels if suffix == "cls" else images):
                    raise DataError(f"{path} sample {key} has a second .{suffix} file; give each sample its own key")
                if suffix != "cls":
                    images[key] = member
                elif (content := shard.extractfile(member)) is not None:
                    labels[key] = content.read()
            # tarfile takes a header it cannot read for the end; a whole archive ends in blocks of zeros
            file.seek(shard.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no header and no end at byte {shard.offset}")
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"cannot read {path}: {error}; replace it with a whole, uncompressed tar file") from error
    for key in labels.keys() - images.keys():
        raise DataError(f"{path} sample {key} has a .cls but no image (.{', .'.join(SHARD_SUFFIXES)}); add it")
    return [
        ShardImage(key, image.offset_data, image.size, _class_number(path, key, labels.get(key)))
        for key, image in images.items()
    ]


def _class_number(path: Path, key: str, text: bytes | None) -> int:
    if text is None:
        raise DataError(f"{path} sample {key} has no .cls file; add one with the number of its class")
    try:
        return int(text)
    except ValueError as error:
        raise DataError(
            f"{path} sample {key} has {text[:20]!r} in its .cls; write the number of its class"
        ) from error
