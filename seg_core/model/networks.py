"""Build a network by name, and find out from the built network what tiling needs to know of it."""

import difflib
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Tracer
from torch.nn.utils.fusion import fuse_conv_bn_eval

from seg_core.errors import SegError
from seg_core.grid import MIN_CHIP, round_up
from seg_core.model.unet import UNet

MAX_HALO = 128  # px; wider contexts (most pretrained encoders) are cut off here: the far pixels hardly count
MAX_PROBE = 2048  # px; a context that does not fit in is taken for unbounded
# It holds for one image, one group, and filters of at most 3 px; with one thread, filters of 1 px are never oneDNN's.
# See use_mkldnn in https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/Convolution.cpp
ONEDNN_VALUES = 20_480
SMALL = 256  # px a side of inputs by which memory is estimated, and height of those that find the context


def build_model(architecture: dict[str, Any], encoder_weights: str | None = None) -> nn.Module:
    """A network from its description: `name` (`unet` or `smp:Unet/resnet34`), `in_channels`, `classes`, ...

    `unet` further takes `width`, `depth` and `patch`. Raises SegError for a name that is not known.
    """
    options = dict(architecture)
    name = options.pop("name")
    if name == "unet":
        return UNet(**options)
    if name.startswith("smp:") and name.count("/") == 1:
        kind, encoder = name.removeprefix("smp:").split("/")
        return _build_smp(kind, encoder, encoder_weights, options)
    raise SegError(f"model {name}: not known: say unet, or smp:ARCHITECTURE/ENCODER such as smp:Unet/resnet34")


def _build_smp(kind: str, encoder: str, weights: str | None, options: dict[str, Any]) -> nn.Module:
    import segmentation_models_pytorch as smp
    import timm

    _check_name("architecture", kind, [cls.__name__ for cls in smp.MODEL_ARCHITECTURES_MAPPING.values()])
    known = smp.encoders.get_encoder_names()
    if encoder.startswith("tu-"):  # any network of timm's
        known = [f"tu-{name}" for name in timm.list_models()]
    _check_name("encoder", encoder, known)
    try:
        with _errors_only("huggingface_hub"):  # it would report each of its five attempts; the line below says all
            model: nn.Module = smp.create_model(kind, encoder_name=encoder, encoder_weights=weights, **options)
    except OSError as error:
        raise SegError(
            f"encoder_weights = {weights}: can't be downloaded for {encoder}: the model hub does not answer: try where "
            f"there is internet, or train from scratch with encoder_weights = none"
        ) from error
    except Exception as error:  # smp and timm refuse what they can't build by errors of any type
        raise SegError(f"model smp:{kind}/{encoder}, encoder_weights = {weights}: {_first_line(error)}") from error
    return model


@contextmanager
def _errors_only(name: str) -> Iterator[None]:
    """Have a logger log nothing but errors meanwhile."""
    log = logging.getLogger(name)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _first_line(error: Exception) -> str:
    """The first line of an error's text, or its type where it has none."""
    text = str(error).strip().strip('"')
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def _check_name(what: str, name: str, known: Any) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, list(known), n=5, cutoff=0)
        raise SegError(f"{what} {name}: not known to segmentation-models-pytorch: near it are {', '.join(near)}")


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """The network, in eval mode, with each batch norm made part of the convolution before it: the same function.

    It saves a pass over memory a layer. Both stay where either is used elsewhere too, or the way to them can't be seen.
    """
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for owner, graph in list(_graphs(model)):
        modules = dict(owner.named_modules(remove_duplicate=False))
        times = Counter(node.target for node in graph.nodes if node.op == "call_module")
        for call in graph.nodes:
            before = call.args[0] if call.args else None
            if not isinstance(before, Node) or {before.op, call.op} != {"call_module"}:
                continue
            conv, norm = modules[str(before.target)], modules[str(call.target)]
            # The types themselves: what is derived from them may do more.
            if type(conv) is not nn.Conv2d or type(norm) is not nn.BatchNorm2d:
                continue
            once = times[before.target] == times[call.target] == places[id(conv)] == places[id(norm)] == 1
            if once and len(before.users) == 1:
                owner.set_submodule(str(before.target), fuse_conv_bn_eval(conv, norm))
                owner.set_submodule(str(call.target), nn.Identity())
    return model


def _graphs(module: nn.Module) -> Iterator[tuple[nn.Module, Graph]]:
    """What a module calls, as a graph; of one whose way depends on its input, those of its children."""
    try:
        yield module, Tracer().trace(module)
    except Exception:  # whatever its code makes of an input that has no values
        for child in module.children():
            yield from _graphs(child)


@dataclass(frozen=True)
class NetworkGeometry:
    """What tiling needs to know of a network."""

    stride: int  # heights and widths must be multiples of it
    context_px: int | None  # how far a stride's cell of output sees beyond itself; None: over the whole chip
    halo: int  # px
    activation_bytes_per_px: int  # memory of a forward pass in float32, per pixel of the chip, estimated
    min_chip: int  # px a side from which on a CPU gives a pixel the same value, to the last bit, in a chip of any size


def check_sizes(name: str, model: nn.Module, in_channels: int, crop: int | None = None) -> None:
    """Raise SegError for a network that does not take, and answer, the sizes at which it is to run.

    They are crops of `crop` px a side, to train on, and chips of any multiple of the stride from MIN_CHIP on. Encoders
    of a fixed input size (https://github.com/pytorch/vision/issues/2151) take no others, some want multiples of more
    than their stride or a least size, and each says so by an error of its own.
    """
    if isinstance(model, UNet):  # takes any multiple of its stride
        return
    stride = stride_of(model)
    chip = round_up(MIN_CHIP, stride)
    for height, width in ((chip, chip + stride), (SMALL, SMALL)):
        if problem := _find_problem(model, in_channels, height, width):
            raise SegError(
                f"model {name}: does not segment {height} x {width} px ({problem}): choose a model that takes any "
                f"multiple of its stride, {stride} px, such as smp:Unet/resnet34"
            )
    if crop is not None and (problem := _find_problem(model, in_channels, crop, crop)):
        raise SegError(f"crop = {crop}: model {name} does not take it ({problem}): {chip} will do")


@torch.inference_mode()
def _find_problem(model: nn.Module, in_channels: int, height: int, width: int) -> str | None:
    """What is wrong with a network's answer to random pixels of a size, or keeps it from answering; None if nothing."""
    pixels = torch.randn(1, in_channels, height, width, generator=torch.Generator().manual_seed(0))
    was_training = model.training
    try:
        answer = model.eval()(pixels)
    except Exception as error:  # networks refuse sizes by errors of any type
        return _first_line(error)
    finally:
        model.train(was_training)
    if answer.shape[-2:] != (height, width):
        return f"it answers with {' x '.join(map(str, answer.shape[-2:]))} px"
    return None if bool(answer.isfinite().all()) else "its answer is not finite"


def measure_network(model: nn.Module, in_channels: int) -> NetworkGeometry:
    """Find stride, context and memory of a network; the latter two by running it on small inputs."""
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        stride = stride_of(model)
        context = _probe_context(model, in_channels, stride)
        memory = _probe_activations(model, in_channels, round_up(SMALL, stride))
        min_chip = MIN_CHIP if context is None else max(MIN_CHIP, find_min_chip(model, in_channels))
    model.train(was_training)
    halo = min(round_up(MAX_HALO if context is None else context, stride), round_up(MAX_HALO, stride))
    return NetworkGeometry(stride, context, halo, memory, min_chip)


def stride_of(model: nn.Module) -> int:
    """What heights and widths of a network's inputs are multiples of, in px."""
    if isinstance(model, UNet):
        return model.stride
    # smp networks accept any size by interpolating, but only windows on the stride's grid agree at their seams.
    encoder: Any = model.encoder
    return int(encoder.output_stride)


def _probe_context(model: nn.Module, in_channels: int, stride: int) -> int | None:
    """How far a cell's influence reaches: a NaN at each place of one stride's cell, and where they come out.

    Windows start and end where cells do, so the distance that counts is from the cell's border, not from the pixel.
    """
    length = round_up(512, stride)
    thin = _find_problem(model, in_channels, stride, length) is None
    height = stride if thin else round_up(SMALL, stride)
    while length <= MAX_PROBE:
        at = length // 2 // stride * stride
        x = torch.zeros(stride, in_channels, height, length)
        for phase in range(stride):
            x[phase, :, :, at + phase] = torch.nan
        # Where one place reaches the ends already, as in networks that pool over all, the others needn't be tried.
        for part in (x[:1], x):
            touched = model(part).isnan().any(dim=1).any(dim=1)
            if bool(touched[:, 0].any() | touched[:, -1].any()):
                break
        else:
            return max(_reach(row, at + phase, stride) for phase, row in enumerate(touched))
        length *= 2
    return None


@torch.inference_mode()
def find_min_chip(model: nn.Module, in_channels: int) -> int:
    """The side, in px, from which on a CPU gives a pixel the same value, to the last bit, in a chip of any size.

    torch hands a convolution to oneDNN where its input holds more than ONEDNN_VALUES; for smaller ones it has routines
    of its own, which add up in another order.
    """
    stride = stride_of(model)
    side = round_up(SMALL, stride)
    sizes: list[int] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].numel()))
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.groups == 1 and min(module.kernel_size) <= 3
    ]
    model(torch.zeros(1, in_channels, side, side))
    for hook in hooks:
        hook.remove()
    return round_up(math.isqrt(ONEDNN_VALUES * side**2 // min(sizes)) + 1, stride)


def _reach(touched: Tensor, source: int, stride: int) -> int:
    """Greatest distance from an input pixel to the near border of a cell of output that it touches."""
    starts = torch.nonzero(touched).flatten() // stride * stride
    return max(0, int(starts.max()) - source, source - int(starts.min()) - stride + 1)


def _probe_activations(model: nn.Module, in_channels: int, side: int) -> int:
    """The four largest outputs of any layers, in bytes a pixel: about what is alive at a forward pass's peak."""
    sizes: list[int] = []

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        sizes.extend(t.numel() for t in (output if isinstance(output, tuple) else (output,)) if isinstance(t, Tensor))

    hooks = [m.register_forward_hook(note) for m in model.modules() if not list(m.children())]
    model(torch.zeros(1, in_channels, side, side))
    for hook in hooks:
        hook.remove()
    return 4 * sum(sorted(sizes)[-4:]) // side**2


def training_bytes_per_px(model: nn.Module, in_channels: int) -> int:
    """Memory of a training step in float32, per pixel of a crop: what a forward pass keeps for the backward one.

    Of a small crop; what both passes hold for a moment is covered by a fourth more.
    """
    side = 256
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(saved: Tensor) -> Tensor:
        kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    was_training = model.training
    model.eval()  # batch norm's statistics stay what they are
    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        output = model(torch.zeros(1, in_channels, side, side))
    model.train(was_training)
    del output
    return sum(size for place, size in kept.items() if place not in own) * 5 // 4 // side**2


def normalise(pixels: Tensor, valid: Tensor, mean: Tensor | Sequence[float], std: Tensor | Sequence[float]) -> Tensor:
    """Pixels `uint8 (n, bands, h, w)` to float32 with mean 0 and deviation 1; 0 where not valid `bool (n, h, w)`.

    Missing pixels thus look the same whatever value stands for them in the file. Mean and deviation that are on the
    device already spare it a wait.
    """
    shift = torch.as_tensor(mean, device=pixels.device).view(-1, 1, 1)
    scale = torch.as_tensor(std, device=pixels.device).view(-1, 1, 1)
    return ((pixels.float() - shift) / scale).masked_fill_(~valid.unsqueeze(1), 0.0)


def class_probability(logits: Tensor, index: int) -> Tensor:
    """Probability of one class, `(n, classes, h, w)` to float32 `(n, h, w)`; one logit stands for two classes.

    By way of float64: in float32 torch rounds differently at the end of a thread's share, wherever that falls.
    """
    if logits.shape[1] == 1:
        positive = logits.double().sigmoid().squeeze(1)
        return (positive if index == 1 else 1 - positive).float()
    return logits.double().softmax(dim=1)[:, index].float()
