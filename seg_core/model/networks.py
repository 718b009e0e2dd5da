"""Build a network by name, and measure on the built network what tiling needs to know about it."""

import difflib
import inspect
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Tracer
from torch.nn.utils.fusion import fuse_conv_bn_eval

from seg_core.environment import log_errors_only
from seg_core.errors import SegError
from seg_core.grid import MIN_CHIP, round_up
from seg_core.model.adapt import list_names
from seg_core.model.encoders import check_encoder, is_local, load_encoder
from seg_core.model.unet import UNet

log = logging.getLogger(__name__)

MAX_HALO = 128  # px; wider contexts (most pretrained encoders) are cut off here: far pixels have little influence
MAX_PROBE = 2048  # px; a context that does not fit into this length counts as unbounded
# Convolutions with more input values than this are computed by oneDNN. This holds for one image, one group, and filters
# of at most 3 px. With one thread, oneDNN never computes filters of 1 px.
# See use_mkldnn in https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/Convolution.cpp
ONEDNN_VALUES = 20_480
SMALL = 256  # px; side of the inputs that measure memory, and height of those that measure the context


def build_model(architecture: dict[str, Any], encoder_weights: str | None = None) -> nn.Module:
    """Build a network from its description: `name` (`unet` or `smp:Unet/resnet34`), `in_channels`, `classes`, ...

    `unet` also takes `width`, `depth` and `patch`. `encoder_weights` names pretrained weights of an smp encoder; None
    gives random ones. Raises SegError for an unknown name, or if the weights can't be downloaded.
    """
    options = dict(architecture)
    name = options.pop("name")
    if name == "unet":
        _check_options(options)
        return UNet(**options)
    if name.startswith("smp:") and name.count("/") == 1:
        kind, encoder = name.removeprefix("smp:").split("/")
        return _build_smp(kind, encoder, encoder_weights, options)
    raise SegError(f"model {name}: not known: say unet, or smp:ARCHITECTURE/ENCODER such as smp:Unet/resnet34")


def _check_options(options: dict[str, Any]) -> None:
    """Raise SegError for options that this version's U-Net does not have."""
    if odd := options.keys() - inspect.signature(UNet).parameters.keys():
        raise SegError(f"model unet: of a version with {', '.join(sorted(odd))}, unknown here: upgrade aerial-seg")


def _build_smp(kind: str, encoder: str, weights: str | None, options: dict[str, Any]) -> nn.Module:
    import segmentation_models_pytorch as smp
    import timm

    _check_name("architecture", kind, [cls.__name__ for cls in smp.MODEL_ARCHITECTURES_MAPPING.values()])
    known = smp.encoders.get_encoder_names()
    if encoder.startswith("tu-"):  # any network of timm
        known = [f"tu-{name}" for name in timm.list_models()]
    _check_name("encoder", encoder, known)
    local = weights if weights is not None and is_local(weights) else None
    if local:
        check_encoder(encoder, local)
    try:
        with log_errors_only("huggingface_hub"):  # it would report each of its five attempts
            hub = None if local else weights
            model: nn.Module = smp.create_model(kind, encoder_name=encoder, encoder_weights=hub, **options)
    except OSError as error:
        raise SegError(
            f"encoder_weights = {weights}: can't be downloaded for {encoder}: the model hub does not answer: try where "
            f"there is internet, or train from scratch with encoder_weights = none"
        ) from error
    except Exception as error:  # smp and timm raise errors of any type for what they can't build
        raise SegError(f"model smp:{kind}/{encoder}, encoder_weights = {weights}: {_first_line(error)}") from error
    if local and (left := load_encoder(model, encoder, local, options["in_channels"])):
        log.warning("encoder_weights = %s: not of the encoder, and left out: %s", local, list_names(left))
    return model


def _first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its type if it has no text."""
    text = str(error).strip().strip('"')
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def _check_name(what: str, name: str, known: Any) -> None:
    if name not in known:
        similar = difflib.get_close_matches(name, list(known), n=5, cutoff=0)
        raise SegError(f"{what} {name}: not known to segmentation-models-pytorch: similar are {', '.join(similar)}")


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """Merge each batch norm of a network in eval mode into the convolution before it, and return the network.

    The network computes the same function, with one pass over memory less per layer. A pair is left alone if either of
    the two is used elsewhere too, or if torch.fx can't trace the code that calls them.
    """
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for owner, graph in list(_trace(model)):
        modules = dict(owner.named_modules(remove_duplicate=False))
        calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
        for call in graph.nodes:
            before = call.args[0] if call.args else None
            if not isinstance(before, Node) or {before.op, call.op} != {"call_module"}:
                continue
            conv, norm = modules[str(before.target)], modules[str(call.target)]
            # Exactly these types: derived ones may compute something else.
            if type(conv) is not nn.Conv2d or type(norm) is not nn.BatchNorm2d:
                continue
            used_once = calls[before.target] == calls[call.target] == uses[id(conv)] == uses[id(norm)] == 1
            if used_once and len(before.users) == 1:
                owner.set_submodule(str(before.target), fuse_conv_bn_eval(conv, norm))
                owner.set_submodule(str(call.target), nn.Identity())
    return model


def _trace(module: nn.Module) -> Iterator[tuple[nn.Module, Graph]]:
    """Yield a module with the graph of its calls. If it can't be traced, yield those of its children."""
    try:
        yield module, Tracer().trace(module)
    except Exception:  # code that depends on the values of its input raises errors of any type
        for child in module.children():
            yield from _trace(child)


@dataclass(frozen=True)
class NetworkGeometry:
    """What tiling needs to know about a network."""

    stride: int  # heights and widths must be multiples of it
    context_px: int | None  # how far a cell of output (a stride's width) sees beyond itself; None: the whole chip
    halo: int  # px
    activation_bytes_per_px: int  # estimated memory of a forward pass in float32, per pixel of the chip
    min_chip: int  # px; see `find_min_chip`


def check_sizes(name: str, model: nn.Module, in_channels: int, crop: int | None = None) -> None:
    """Raise SegError if a network does not work with the input sizes that it will get.

    These are chips whose sides are any multiples of the stride from MIN_CHIP on, and for training, crops of `crop` px.
    Some encoders need a fixed input size (https://github.com/pytorch/vision/issues/2151), a minimum size, or multiples
    of more than their stride. Each reports this by an error of its own.
    """
    if isinstance(model, UNet):  # accepts any multiple of its stride
        return
    stride = stride_of(model)
    chip = round_up(MIN_CHIP, stride)
    for height, width in ((chip, chip + stride), (SMALL, SMALL)):
        if problem := _find_problem(model, in_channels, height, width):
            raise SegError(
                f"model {name}: does not segment {height} x {width} px ({problem}): choose a model that accepts any "
                f"multiple of its stride, {stride} px, such as smp:Unet/resnet34"
            )
    if crop is not None and (problem := _find_problem(model, in_channels, crop, crop)):
        raise SegError(f"crop = {crop}: model {name} does not accept it ({problem}): {chip} works")


@torch.inference_mode()
def _find_problem(model: nn.Module, in_channels: int, height: int, width: int) -> str | None:
    """Run a network on random pixels of a size. Returns what is wrong, or None."""
    pixels = torch.randn(1, in_channels, height, width, generator=torch.Generator().manual_seed(0))
    was_training = model.training
    try:
        output = model.eval()(pixels)
    except Exception as error:  # networks raise errors of any type for sizes that they do not accept
        return _first_line(error)
    finally:
        model.train(was_training)
    if output.shape[-2:] != (height, width):
        return f"its output has {' x '.join(map(str, output.shape[-2:]))} px"
    return None if bool(output.isfinite().all()) else "its output is not finite"


def measure_network(model: nn.Module, in_channels: int) -> NetworkGeometry:
    """Find stride, context, memory and minimum chip of a network with `in_channels` bands, by running small inputs."""
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
    """Return the number of px that heights and widths of a network's inputs must be multiples of."""
    if isinstance(model, UNet):
        return model.stride
    # smp networks accept any size by interpolating, but neighbouring windows agree only on the stride's grid.
    encoder: Any = model.encoder
    return int(encoder.output_stride)


def _probe_context(model: nn.Module, in_channels: int, stride: int) -> int | None:
    """Measure the context in px: put a NaN at each position within one cell, and see how far NaNs spread.

    A cell has the width of the stride. Windows start and end at the borders of cells, so the distance is measured from
    the cell's border and not from the pixel. Returns None if it exceeds MAX_PROBE / 2.
    """
    length = round_up(512, stride)
    thin = _find_problem(model, in_channels, stride, length) is None
    height = stride if thin else round_up(SMALL, stride)
    while length <= MAX_PROBE:
        at = length // 2 // stride * stride
        x = torch.zeros(stride, in_channels, height, length)
        for phase in range(stride):
            x[phase, :, :, at + phase] = torch.nan
        # If the first position already reaches the ends, as with global pooling, the others need not be tried.
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
    """Return the smallest side of chips, in px, from which a CPU computes a pixel to the same bits in any chip.

    torch calls oneDNN for convolutions whose input has more than ONEDNN_VALUES values. For smaller ones it uses its own
    routines, which add up in another order.
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
    """Return the largest distance in px from an input pixel to the nearer border of an output cell that it touches."""
    starts = torch.nonzero(touched).flatten() // stride * stride
    return max(0, int(starts.max()) - source, source - int(starts.min()) - stride + 1)


def _probe_activations(model: nn.Module, in_channels: int, side: int) -> int:
    """Return the size of the four largest layer outputs, in bytes per pixel of input.

    This is about what is in memory at the peak of a forward pass.
    """
    sizes: list[int] = []

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        sizes.extend(t.numel() for t in (output if isinstance(output, tuple) else (output,)) if isinstance(t, Tensor))

    hooks = [m.register_forward_hook(note) for m in model.modules() if not list(m.children())]
    model(torch.zeros(1, in_channels, side, side))
    for hook in hooks:
        hook.remove()
    return 4 * sum(sorted(sizes)[-4:]) // side**2


def training_bytes_per_px(model: nn.Module, in_channels: int, stride: int) -> int:
    """Return the memory of a training step in float32, in bytes per pixel of a crop.

    This is what the forward pass saves for the backward pass, measured on a small crop, whose sides are multiples of
    the stride. A quarter is added for what both passes hold for a short time.
    """
    side = round_up(SMALL, stride)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(saved: Tensor) -> Tensor:
        kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    was_training = model.training
    model.eval()  # so that the statistics of batch norm do not change
    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        output = model(torch.zeros(1, in_channels, side, side))
    model.train(was_training)
    del output
    return sum(size for place, size in kept.items() if place not in own) * 5 // 4 // side**2


def normalise(pixels: Tensor, valid: Tensor, mean: Tensor | Sequence[float], std: Tensor | Sequence[float]) -> Tensor:
    """Normalise pixels `uint8 (n, bands, h, w)` to `float32` with mean 0 and standard deviation 1 per band.

    Pixels that are not `valid`, `bool (n, h, w)`, become 0. Missing pixels thus look the same whatever value the file
    has for them. Mean and deviation are `(bands,)`, or `(n, bands)` if images differ in them. Pass them as tensors on
    the device to avoid waiting for their copies.
    """
    shift = torch.as_tensor(mean, device=pixels.device)[..., None, None]
    scale = torch.as_tensor(std, device=pixels.device)[..., None, None]
    return pixels.float().sub_(shift).div_(scale).masked_fill_(~valid.unsqueeze(1), 0.0)


def class_probability(logits: Tensor, index: int) -> Tensor:
    """Return the probability of one class, `float32 (n, h, w)`, from logits `(n, classes, h, w)`.

    A single logit stands for two classes, of which it is class 1. The computation is in float64: in float32, torch
    rounds the last pixels of each thread's share differently, and where shares end depends on the chip's size.
    """
    if logits.shape[1] == 1:
        positive = logits.double().sigmoid().squeeze(1)
        return (positive if index == 1 else 1 - positive).float()
    return logits.double().softmax(dim=1)[:, index].float()


def class_logit(logits: Tensor, index: int) -> Tensor:
    """Return the logit of one of two classes, `float32 (n, h, w)`, from logits of one output or two `(n, 1|2, h, w)`.

    Its sigmoid is `class_probability`.
    """
    if logits.shape[1] == 1:
        return logits.float().squeeze(1) * (1 if index == 1 else -1)
    return logits[:, index].float() - logits[:, 1 - index].float()
