import importlib

import pytest

import statickey

PUBLIC = {
    "MIXERS",
    "Calibration",
    "CalibrationReport",
    "ConvStaticKeyAttention",
    "ConversionReport",
    "FactorizedConvStaticKeyAttention",
    "HostRule",
    "Site",
    "StaticKeyAttention",
    "StaticKeyError",
    "TokenMixer",
    "convert",
    "load_converted",
    "register_host_rule",
    "resample_static_key",
    "save_converted",
    "set_key",
    "set_key_size",
    "set_off_grid",
    "static_key_attention",
    "static_key_weights",
    "unfold_queries",
}


def test_public_names_are_pinned():
    assert set(statickey.__all__) == PUBLIC
    assert all(hasattr(statickey, name) for name in PUBLIC)


def test_mixer_names_are_pinned():
    names = "mhsa ska cska fcska partly_static identity pool sepconv random constant synthesizer kv_shared"
    assert list(statickey.MIXERS) == names.split()


@pytest.mark.parametrize("name", ["bench", "compare", "data", "export", "tasks", "viz"])
def test_packages_are_there_when_asked_for(name):
    assert name in dir(statickey)
    assert getattr(statickey, name) is importlib.import_module(f"statickey.{name}")


def test_other_names_are_not():
    with pytest.raises(AttributeError, match="module 'statickey' has no attribute 'task'"):
        statickey.task  # noqa: B018
