"""What a type checker and a prompt know of the surface: options, choices, public names."""

import inspect
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from torch import nn

import bnstats
import cases
from bnstats.conversion.change import own_options
from bnstats.conversion.families import CENTERED, FAMILIES, PLAIN
from bnstats.conversion.run import Target
from bnstats.recomputation.methods import METHODS
from bnstats.recomputation.run import MethodName

SCRIPT = """\
import bnstats
from bnstats.integrations.timm import norm_act_layer
from torch import Tensor, nn

class Net(nn.Module):
    pass

loader = [nn.Linear(1, 1).weight]
net: Net = bnstats.convert_batchnorm(Net(), "ema", momentum=0.1, debias=False, pooled=True)
bnstats.convert_batchnorm(net, "cumulative", include=lambda name, layer: name.startswith("a"))
bnstats.convert_batchnorm(net, "moving_average", window=16, warmup=0, max_ratio=2, center=False)
result = bnstats.recompute_population_stats(net, loader, method="layerwise", on_nonfinite="skip")
print(result.drift["a"].kl, result.after.drift_from(net).worst_first())
print(bnstats.EMABatchNorm2d(3, 1e-5, 0.1, debias=False), bnstats.plot_drift(result))
make_layer = norm_act_layer("ema", act_layer=nn.SiLU)
with bnstats.hold_statistics(net), bnstats.observe(net) as seen:
    print(seen.stats())
with bnstats.masked(net, loader[0]), bnstats.record_batch_stats(net) as record:
    print(record["a"].psi)

@bnstats.hold_statistics(net)
def step(x: Tensor, scale: float = 1) -> Tensor:
    return x * scale

stepped: Tensor = step(loader[0], scale=2)
"""

MISTAKES = [
    'bnstats.recompute_population_stats(net, loader, method="layer_wise")',
    'bnstats.measure_population_stats(net, loader, method="batch_avg")',
    'bnstats.recompute_population_stats(net, loader, on_nonfinite="ignore")',
    'bnstats.convert_batchnorm(net, "moving_average", windw=16)',
    'bnstats.convert_batchnorm(net, "moving-average")',
    'bnstats.convert_batchnorm(net, "ema", window=16)',
    'bnstats.convert_batchnorm(net, "cumulative", debias=True)',
    'bnstats.convert_batchnorm(net, "ema", include=["layer4"])',
    "bnstats.recompute_population_stats(loader, net)",
    'norm_act_layer("emma")',
    'step("x")',
    "scaled: int = step(loader[0])",
    "bnstats.hold_statistics(net)(3)",
    "seen.drift_from(net)",
    "bnstats.EMABatchNorm2d(3, debiased=True)",
    "result.after.apply_to(net.state_dict())",
    "bnstats.estimate_running_error(result)",
    "bnstats.plot_drift(net)",
    'bnstats.convert(net, "ema")',
    "bnstats.recompute(net, loader)",
]


# What torch and a figure import, and no mistake above depends on: of the surface's types, Figure
# and ProcessGroup come from there. Reading it takes mypy most of its time.
UNREAD = [
    *("IPython", "matplotlib", "numpy", "sympy", "torch._dynamo", "torch._functorch"),
    *("torch._inductor", "torch.ao", "torch.distributed", "torch.export", "torch.fx"),
    *("torch.onnx", "torch.testing", "torch.utils.data", "timm"),
]
CONFIGURATION = f"""\
[mypy]
[mypy-{",".join(f"{package}.*" for package in UNREAD)}]
follow_imports = skip
follow_imports_for_stubs = True
"""


def test_mypy_passes_a_users_script_and_flags_each_mistake(tmp_path, request):
    pytest.importorskip("mypy")
    script = tmp_path / "script.py"
    script.write_text("\n".join([SCRIPT, *MISTAKES, ""]))
    configuration = tmp_path / "mypy.ini"
    configuration.write_text(CONFIGURATION)
    # It takes seconds to know torch, and less than one to remember it.
    kept = getattr(request.config, "cache", None)  # None with -p no:cacheprovider
    cache = tmp_path if kept is None else kept.mkdir("mypy")
    source = str(Path(bnstats.__file__).parent.parent)
    options = [
        "--strict", f"--config-file={configuration}", "--no-error-summary",
        f"--cache-dir={cache}",
        "--follow-imports=silent",  # as a package that is installed
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, script.name],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": source},
        capture_output=True,
        text=True,
        check=False,
    )
    first = len(SCRIPT.splitlines()) + 2
    flagged = {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line}
    assert flagged == set(range(first, first + len(MISTAKES))), done.stdout + done.stderr


def test_the_choices_that_are_typed_are_those_that_there_are():
    assert set(typing.get_args(MethodName)) == METHODS.keys()
    assert set(typing.get_args(Target)) == FAMILIES.keys() - {PLAIN}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="overloads cannot be asked for before")
def test_the_options_that_are_typed_are_those_that_conversion_takes():
    typed = {}
    for overload in typing.get_overloads(bnstats.convert_batchnorm):
        _, to, _, *options = inspect.signature(overload).parameters.values()
        (family,) = typing.get_args(eval(to.annotation, {"Literal": typing.Literal}))
        typed[family] = {option.name for option in options}
    for family in FAMILIES.keys() - {PLAIN}:
        beside = {"momentum", "center"} if family == CENTERED else {"momentum"}
        assert typed[family] == own_options(family) | beside, family


def test_dir_shows_the_public_names():
    shown = {name for name in dir(bnstats) if not name.startswith("__")}
    assert shown == {*bnstats.__all__, "errors"}


def test_no_package_has_the_name_of_a_verb():
    # bnstats.convert was one, and calling it raised "'module' object is not callable".
    packages = {name for name, value in vars(bnstats).items() if inspect.ismodule(value)}
    assert not packages & {name.split("_")[0] for name in bnstats.__all__}


def test_half_of_a_name_is_answered_with_the_whole():
    for half, whole in (("convert", "convert_batchnorm"), ("plot", "plot_batch_stats and plot_")):
        says = f"module 'bnstats' has no attribute '{half}'; there is {whole}"
        with pytest.raises(AttributeError, match=says):
            getattr(bnstats, half)
    with pytest.raises(AttributeError, match=r"has no attribute 'nothing'$"):
        getattr(bnstats, "nothing")  # noqa: B009


def test_a_mistyped_name_is_answered_with_the_nearest():
    with pytest.raises(AttributeError, match=r"'EMABatchnorm2d'; there is EMABatchNorm2d$"):
        getattr(bnstats, "EMABatchnorm2d")  # noqa: B009
    assert not hasattr(bnstats, "__path_of_a_tool__")


@cases.each_family
def test_every_layer_tells_its_options(family):
    for cls in (family.base, *family.layers.values()):
        doc = inspect.cleandoc(cls.__doc__)
        assert doc.count("Args:") == 1, cls
        for option in inspect.signature(cls).parameters:
            assert f"\n    {option}: " in doc, (cls, option)
        assert doc.splitlines()[0], cls
        assert issubclass(cls, nn.modules.batchnorm._BatchNorm)
