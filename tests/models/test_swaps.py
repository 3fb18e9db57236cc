import pytest

from statickey.errors import StaticKeyError, UnknownNameError
from statickey.models import Swap

TEXTS = {
    "ska": Swap("ska"),
    "cska:kernel_size=5": Swap("cska", mixer_args={"kernel_size": 5}),
    "ska@-3,-2,-1": Swap("ska", layers=[-3, -2, -1]),
    "fcska:head_dim=16,kernel_size=5@blocks.1*": Swap(
        "fcska", layers=["blocks.1*"], mixer_args={"kernel_size": 5, "head_dim": 16}
    ),
    "ska:off_grid=window,qkv_bias=true@0": Swap(
        "ska", layers=[0], mixer_args={"off_grid": "window", "qkv_bias": True}
    ),
    "ska:scale=0.001": Swap("ska", mixer_args={"scale": 1e-3}),
    "ska:scale=0.5,size=[7,7]": Swap("ska", mixer_args={"scale": 0.5, "size": [7, 7]}),
}


@pytest.mark.parametrize("text", TEXTS)
def test_text_and_back(text):
    assert Swap.parse(text) == TEXTS[text]
    assert str(TEXTS[text]) == text
    assert Swap.parse(str(Swap.parse(text))) == TEXTS[text]


def test_the_order_of_arguments_does_not_matter():
    assert str(Swap.parse("fcska:kernel_size=5,head_dim=16")) == "fcska:head_dim=16,kernel_size=5"
    assert str(Swap.parse("ska@all")) == "ska"
    assert Swap.parse("ska:scale=1e-3").mixer_args == {"scale": 0.001}
    assert Swap("ska", layers=-1) == Swap("ska", layers=[-1]) == Swap.parse("ska@-1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("skaa", "unknown mixer 'skaa'; did you mean"),
        ("", "unknown mixer ''"),
        ("ska:", "'ska:' ends too soon; write MIXER"),
        ("ska@", "'ska@' ends too soon"),
        ("ska:5", "has '5'; write MIXER"),
        ("ska:a=1,a=2", "has 'a=2'; write MIXER"),
        ("ska:key_size=4,4", r"has '4'; write MIXER.*ska:key_size=\[4,4\] \(a pair in brackets\)"),
        ("ska:a={", "has 'a={', whose value cannot be read"),
        (5, "mixer 5 must be text: MIXER"),
    ],
)
def test_what_is_no_swap(text, message):
    with pytest.raises((StaticKeyError, UnknownNameError), match=message):
        Swap.parse(text)
