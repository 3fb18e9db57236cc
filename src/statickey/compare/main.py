"""The main job: train one network with different token mixers, and say how sure the difference is."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape

from .._files import explained_write, write_text
from ..data import ImageData, OnBadImage, load_images
from ..errors import DataError, OutputError, StaticKeyError
from .config import CompareConfig
from .display import Display, results_table
from .report import write_report
from .results import read_runs, summarize, write_results
from .run import RunFolder, data_module, new_model, new_trainer, train_run

README = """Results of `statickey compare`.
config.yaml   reruns or continues it: statickey compare --config config.yaml
report.html   the results as a page
results.csv, summary.json   the results as numbers
runs/         one folder a run: run.json, predictions.npz, model.safetensors
"""


def compare(
    data: str = "digits",
    *,
    mixers: Sequence[str] = ("mhsa", "ska", "cska", "fcska"),
    seeds: Sequence[int] = (0, 1, 2),
    epochs: int = 14,
    limit: int | None = None,
    model: str = "small_vit",
    out: str = "statickey-compare",
    data_dir: str | None = None,
    img_size: int | None = None,
    on_bad_image: OnBadImage = "fail",
    model_args: Mapping[str, Any] | None = None,
    batch_size: int = 64,
    lr: float | None = None,
    weight_decay: float = 0.05,
    warmup_epochs: float = 1.0,
    label_smoothing: float = 0.1,
    clip_grad: float = 1.0,
    ema_decay: float = 0.999,
    crop_padding: int | None = None,
    flip: bool | None = None,
    holdout: float = 0.1,
    score_on: Literal["test", "holdout"] = "test",
    accelerator: str = "auto",
    precision: str = "32-true",
    console: Console | None = None,
) -> dict[str, Any]:
    """Train one network with several token mixers and seeds under one recipe, and compare test accuracies.

    At one seed all mixers get bit-identical shared weights, batches and augmentations. Finished runs in
    ``out`` are reused, an interrupted run continues at its last finished epoch, and more mixers or seeds may
    be added later. The test images are read once per run, after its last epoch.

    Args:
        data: ``digits``, ``cifar10``, ``cifar100``, an image folder (train/CLASS/*.jpg, val/CLASS/*.jpg) or a
            folder of Hugging Face parquet files.
        mixers: Names of token mixers; the differences are to ``mhsa`` if it is among them, else to the first.
        seeds: One run per mixer and seed.
        epochs: Passes over the training images.
        limit: Use this many training images, drawn once at random.
        model: ``small_vit`` or the name of a timm vision transformer.
        out: Folder of the results.
        data_dir: Where torchvision keeps cifar10 and cifar100.
        img_size: Bring all images to this many pixels; default as stored.
        on_bad_image: Refuse data with an unreadable image, or skip such images.
        model_args: Further constructor arguments of the network, such as depth or embed_dim.
        batch_size: Images per step.
        lr: Peak learning rate of AdamW; default 3e-3 for images up to 16 pixels, else 1e-3, each tuned for mhsa.
        weight_decay: Decoupled weight decay; biases, norms, position embeddings and keys have none.
        warmup_epochs: Epochs of linear warm-up before the cosine.
        label_smoothing: Label smoothing.
        clip_grad: Largest gradient norm; 0 for no limit.
        ema_decay: Decay of the averaged weights that the EMA column scores.
        crop_padding: Padding of the random crop in pixels; default an eighth of the image, none for digits.
        flip: Mirror images at random; default yes, except for digits.
        holdout: Share of the training images held out for the learning curves.
        score_on: Score the test images, or the held-out ones while tuning.
        accelerator: Lightning's accelerator.
        precision: Lightning's precision.
        console: Where to print; default the terminal.

    Returns:
        What is in ``out/summary.json``.

    Raises:
        StaticKeyError: An argument, the data or the folder is not usable; the message says what to do.
        KeyboardInterrupt: Ctrl-C; the same call continues.
    """
    config = CompareConfig.of(locals())
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    display = Display(console)
    with display.busy("reading images"):
        images = load_images(
            config.data,
            data_dir=None if data_dir is None else Path(data_dir),
            img_size=img_size,
            limit=limit,
            on_bad_image=on_bad_image,
        )
    for line in images.skipped[:5]:
        display.say(f"[yellow]skipped[/yellow] {escape(line)}")
    if len(images.skipped) > 5:
        display.say(f"[yellow]skipped[/yellow] {len(images.skipped)} unreadable images in all")
    _check_before_writing(config, images)
    root = Path(config.out)
    config_hash = config.hash(images.fingerprint())
    with _locked(root):
        merged = config.joined(root)
        read_runs(root, config_hash)  # refuses runs from other data before hours are spent beside them
        merged.write(root)
        write_text(root / "README.txt", README)
        _train_missing(config, images, root, config_hash, display)
        runs = read_runs(root, config_hash)
        summary = summarize(merged, images, runs)
        write_results(root, summary, runs)
        with display.busy("drawing the report"):
            report = write_report(root, merged, images, summary, runs)
    display.console.print(results_table(summary))
    display.say(f"report: {escape(str(report))}")
    return summary


def _check_before_writing(config: CompareConfig, images: ImageData) -> None:
    """Build everything once, so that a refusal comes before the first file."""
    if len(images.class_names) < 2:
        raise DataError(f"{config.data} has the one class {images.class_names}; a classifier needs two")
    for mixer in config.mixers:
        new_model(config, images, mixer, config.seeds[0])
    data_module(config, images, config.seeds[0])
    new_trainer(config, [])


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Hold the folder; the lock goes with the process, however it ends.

    Raises:
        OutputError: Another process holds it, or the folder cannot be written.
    """
    with explained_write(root):
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise OutputError(f"another process is writing to {root}; wait for it or choose another --out") from error
    try:
        yield
    finally:
        lock.release()


def _train_missing(config: CompareConfig, images: ImageData, root: Path, config_hash: str, display: Display) -> None:
    folders = [RunFolder(root, mixer, seed) for seed in config.seeds for mixer in config.mixers]
    missing = [folder for folder in folders if not folder.result.is_file()]
    if len(missing) < len(folders):
        display.say(f"{len(folders) - len(missing)} of {len(folders)} runs are finished already: reused")
    if not missing:
        return
    with display.runs(len(missing)) as bars:
        for folder in missing:
            progress = bars.start(f"{folder.mixer} seed {folder.seed}", config.epochs)
            try:
                result = train_run(config, images, folder, config_hash, progress)
            except StaticKeyError as error:
                raise type(error)(f"{folder.mixer} seed {folder.seed}: {error}") from error
            finally:
                progress.close()
            bars.finish(
                f"{folder.mixer} seed {folder.seed}: {result['accuracy']:.2f} % of "
                f"{result['scored_images']} {config.score_on} images, {result['train_seconds']:.0f} s"
            )
