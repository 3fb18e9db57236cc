import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from image_folders import make_folder, make_parquet, make_shards
from statickey.data.plan import BatchPlan, mix_seed, seeded
from statickey.data.sources import open_sources
from statickey.data.stream import ImageStream, open_stream, stream_transforms
from statickey.errors import DataError, StaticKeyError

POLICY = "rand-m9-n2-mstd0.5-inc1"
KINDS = {"folder": make_folder, "parquet": make_parquet, "shards": make_shards}


def make_photos(root, count=12):
    """A folder of one class with different, structured pictures."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        folder = root / split / "a"
        folder.mkdir(parents=True)
        for i in range(count):
            coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((30, 24), Image.Resampling.BICUBIC).save(folder / f"{i:02}.png")
    return root


def make_stream(root, on_bad_image="fail", **options):
    sources = open_sources(str(root))
    transform = stream_transforms(16, **{"train": True, "policy": POLICY} | options)
    return ImageStream(sources.train, transform, len(sources.class_names), on_bad_image)


def plan(*indices, seed=5, first=0):
    return BatchPlan(torch.tensor(indices), seed, first)


def read(stream, plans, **options):
    loader = DataLoader(stream, batch_size=None, sampler=plans, **options)
    return [images.clone() for images, _ in loader]


def test_batches_repeat_and_differ_between_seeds_and_images(tmp_path):
    stream = make_stream(make_photos(tmp_path))
    images, labels = stream[plan(0, 1, 2)]
    assert images.shape == (3, 3, 16, 16)
    assert images.dtype == torch.uint8
    assert labels.tolist() == [0, 0, 0]
    torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
    assert torch.equal(images, stream[plan(0, 1, 2)][0])
    assert not torch.equal(images, stream[plan(0, 1, 2, seed=6)][0])
    same = stream[plan(*[0] * 8)][0]
    assert len({x.numpy().tobytes() for x in same}) > 6


def test_a_part_of_a_batch_is_the_same_on_any_rank(tmp_path):
    stream = make_stream(make_photos(tmp_path))
    whole = stream[plan(4, 3, 2, 1)][0]
    parts = [stream[plan(4, 3)][0], stream[plan(2, 1, first=2)][0]]
    assert torch.equal(whole, torch.cat(parts))


def test_evaluation_resizes_and_crops_the_centre(tmp_path):
    stream = make_stream(make_photos(tmp_path), train=False, policy=None)
    image = Image.open(tmp_path / "train/a/03.png").resize((22, 18), Image.Resampling.BICUBIC)
    expected = np.asarray(image.crop((3, 1, 19, 17))).transpose(2, 0, 1)
    assert torch.equal(stream[plan(3)][0][0], torch.from_numpy(expected.copy()))


def test_flip_and_policy_can_be_switched_off(tmp_path):
    stream = make_stream(make_photos(tmp_path), policy="none", flip=False)
    names = [type(step).__name__ for step in stream.transform.transforms]
    assert names == ["RandomResizedCropAndInterpolation", "MaybePILToTensor"]


def test_strongest_policy_posterizes_to_four_bits(tmp_path):
    stream = make_stream(make_photos(tmp_path), policy="rand-m10-n1")
    (policy,) = (step for step in stream.transform.transforms if type(step).__name__ == "RandAugment")
    (posterize,) = (op for op in policy.ops if op.name == "PosterizeIncreasing")
    assert [posterize.level_fn(level, {})[0] for level in (0, 5, 10)] == [8, 6, 4]
    stream[plan(*range(12), *range(12), *range(12), *range(12))]  # timm's own rule raises at magnitude 10


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(tmp_path, workers):
    stream = make_stream(make_photos(tmp_path))
    plans = [plan(0, 5, 7, seed=1), plan(2, 2, seed=2), plan(11, seed=3)]
    alone, shared = read(stream, plans), read(stream, plans, num_workers=workers)
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


@pytest.mark.slow
def test_spawned_workers(tmp_path):
    stream = make_stream(make_shards(tmp_path))
    plans = [plan(0, 2, seed=1), plan(3, seed=2)]
    shared = read(stream, plans, num_workers=2, multiprocessing_context="spawn")
    assert all(torch.equal(a, b) for a, b in zip(read(stream, plans), shared, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_streams_survive_pickling(tmp_path, kind):
    stream = make_stream(KINDS[kind](tmp_path))
    copy = pickle.loads(pickle.dumps(stream))
    for ours, theirs in zip(stream[plan(0, 3)], copy[plan(0, 3)], strict=True):
        assert torch.equal(ours, theirs)


def global_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002


def test_global_random_states_are_left_alone(tmp_path):
    stream = make_stream(make_photos(tmp_path))
    before = global_states()
    stream[plan(0, 1)]
    assert global_states() == before


def test_seeded_seeds_everything_and_gives_back_after_errors():
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    before = global_states()
    drawn = []
    for seed in (1, 1, mix_seed(1)):
        with pytest.raises(KeyError), seeded(seed):
            drawn.append(draw())
            raise KeyError
    assert drawn[0] == drawn[1]
    assert all(a != b for a, b in zip(drawn[0], drawn[2], strict=True))
    assert global_states() == before


def test_bad_image_is_named_or_the_next_one_taken(tmp_path):
    make_folder(tmp_path, per_class=2)  # a/0, a/1, b/0, b/1
    (tmp_path / "train/a/1.png").write_bytes(b"no image")
    (tmp_path / "train/b/1.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot read image .*train/a/1.png: .*--on-bad-image skip"):
        make_stream(tmp_path)[plan(0, 1)]
    stream = make_stream(tmp_path, "skip", train=False)
    with pytest.warns(UserWarning, match=r"train/[ab]/1.png: .*; the next one takes its place"):
        images, labels = stream[plan(0, 1, 2, 3)]
    assert labels.tolist() == [0, 1, 1, 0]
    assert images[:, 0, 0, 0].tolist() == [0, 40, 40, 0]


def test_no_readable_image(tmp_path):
    make_folder(tmp_path, per_class=1)
    for path in tmp_path.glob("train/*/0.png"):
        path.write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(DataError, match=r"no readable image left; the last bad one is"):
        make_stream(tmp_path, "skip")[plan(0)]


def test_an_error_of_the_transform_is_not_a_bad_image(tmp_path):
    stream = make_stream(make_folder(tmp_path), "skip")
    stream.transform = int
    with pytest.raises(TypeError):
        stream[plan(0)]


def test_labels_outside_the_classes_are_refused_at_once(tmp_path):
    source = open_sources(str(make_shards(tmp_path))).train
    with pytest.raises(DataError, match=r"train-1.tar sample 002 has label 2, outside the 2 classes"):
        ImageStream(source, stream_transforms(8, train=False), 2)


REFUSED = {
    "policy": ({"policy": "augmix-m5"}, "'augmix-m5'"),
    "size": ({"img_size": 0}, "img_size=0 must be a positive number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    options, message = REFUSED[case]
    with pytest.raises(DataError, match=message):
        stream_transforms(**{"img_size": 16, "train": True} | options)


def test_refuses_an_unknown_choice(tmp_path):
    with pytest.raises(StaticKeyError, match="on_bad_image='warn' must be one of fail, skip"):
        make_stream(make_folder(tmp_path), "warn")


def test_a_stream_is_known_by_the_names_of_its_images(tmp_path):
    first, second = (make_folder(tmp_path / name, per_class=3) for name in ("a", "b"))
    one, other = (open_stream(str(folder), img_size=8) for folder in (first, second))
    assert one.fingerprint() == other.fingerprint()  # wherever it lies
    files = sorted((second / "train" / "a").iterdir())
    files[0].rename(files[0].with_name("zzz.png"))
    renamed = open_stream(str(second), img_size=8)
    assert renamed.fingerprint() != one.fingerprint()
    assert renamed.fingerprint_of_0_1() == one.fingerprint_of_0_1()
