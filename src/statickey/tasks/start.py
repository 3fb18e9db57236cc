"""The weights a run starts from: a file, those of another run, or of a comparison's run with the same mixer."""

from pathlib import Path

from .._files import read_json
from ..errors import StaticKeyError
from ..models import WEIGHTS_FILE

RESULT_FILE, RUNS = "run.json", "runs"


def start_files(weights: str) -> dict[tuple[str, int] | None, Path]:
    """The files that ``weights`` stands for, those of a comparison by mixer and seed.

    Raises:
        StaticKeyError: A folder without a finished run.
    """
    place = Path(weights)
    if not place.is_dir():
        return {None: place}
    if (place / RESULT_FILE).is_file():
        return {None: place / WEIGHTS_FILE}
    found: dict[tuple[str, int] | None, Path] = {}
    for result in sorted(place.glob(f"{RUNS}/*/{RESULT_FILE}")):
        run = read_json(result, "give a weights file")
        found[str(run.get("mixer")), int(run.get("seed", 0))] = result.parent / WEIGHTS_FILE
    if not found:
        raise StaticKeyError(
            f"weights={weights!r} is neither a run's folder nor a comparison's; give one of a finished run, or a "
            ".safetensors file"
        )
    return found


def start_file(weights: str, mixer: str | None, seed: int) -> Path:
    """The file that the run of a mixer and a seed starts from.

    Of a comparison it is the run of the same mixer, and of the same seed, or of the first where there is none.

    Raises:
        StaticKeyError: As ``start_files``, or the comparison has no finished run of the mixer.
    """
    files = start_files(weights)
    if None in files:
        return files[None]
    own = {key[1]: path for key, path in files.items() if key is not None and key[0] == str(mixer)}
    if not own:
        there = sorted({key[0] for key in files if key is not None})
        raise StaticKeyError(
            f"weights={weights!r} has no finished run of {mixer}, but of {', '.join(there)}; train it there first: "
            "statickey compare --mixers ..., or give a weights file"
        )
    return own.get(seed, own[min(own)])
