"""Models that are not in ``MODELS``: the user's own files, timm's and torchvision's models, and weights from files.

A model is named in file names and settings by ``timm-{NAME}``, ``torchvision-{NAME}``, or, if it comes from a file,
``{NAME in lower case}-{8 digits of a hash of the source}``. A changed source is therefore another model. The hash
covers the file and the modules in its folder that it imports, directly or indirectly.

A checkpoint never names the code to run: only a file that the caller names is executed.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import inspect
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from src.artifacts.io import read_checkpoint
from src.errors import ArgumentError, FileError, UserError
from src.lazy import torch
from src.rng import global_generators

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

_ROOT = Path(__file__).parents[2]
_PROJECT = ("src", "mpe")  # in the user's files, these names are this project's packages
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model")  # keys under which files keep a state dict


# ------------------------------------------------------------------------------------------------ the user's files


class SourceFile:
    """A Python file that defines a model.

    Args:
        path: The file.
        attribute: The name of the callable in it.

    Attributes:
        text: The value of ``--model``.
        name: The model's name in file names and settings.

    Raises:
        ArgumentError: The file is not a Python file, or the attribute is not an identifier.
        FileError: The file is missing or has a syntax error.
    """

    def __init__(self, path: Path, attribute: str) -> None:
        self.text = f"{path}:{attribute}"
        if path.suffix != ".py" or not attribute.isidentifier():
            raise ArgumentError("model", f"{self.text}: give FILE.py:NAME, the name of a class or function in a file")
        self.path, self.attribute = path.expanduser().resolve(), attribute
        self._sources = _sources(self.path)
        self._files = {self.path.parent / (name or self.path.name) for name in self._sources}
        digest = hashlib.sha256(attribute.encode())
        for name in sorted(self._sources):
            digest.update(f"\n{name}\n".encode() + self._sources[name])
        self.name = f"{attribute.lower()}-{digest.hexdigest()[:8]}"
        self._module: ModuleType | None = None

    def build(self, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
        """Call the callable with these three keyword arguments; the file is executed on the first call.

        Raises:
            ArgumentError: The file does not define the name, or it does not name a suitable callable.
            FileError: The code raises an error; the message names file and line.
        """
        sizes = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
        with self._on_path():
            if self._module is None:
                self._module = self._execute()
            factory = getattr(self._module, self.attribute, None)
            if not callable(factory):
                raise ArgumentError("model", f"{self.text}: the file defines no class or function of this name")
            try:
                inspect.signature(factory).bind(**sizes)
            except (TypeError, ValueError) as error:
                raise ArgumentError(
                    "model",
                    f"{self.text}: must accept the keyword arguments num_classes, in_channels, image_size ({error})",
                ) from error
            with user_code(self):
                model = factory(**sizes)
        return model

    def line_of(self, error: BaseException) -> str | None:
        """Describe an error of this source in one line with file and line.

        Returns:
            The line; None if neither this source nor a library that it called raised the error.
        """
        where, frame = None, error.__traceback__
        while frame is not None:
            file = Path(frame.tb_frame.f_code.co_filename)
            if file in self._files:
                where = f"{file}, line {frame.tb_lineno}"
            elif any(_ROOT / name in file.parents for name in _PROJECT):
                where = None
            frame = frame.tb_next
        return None if where is None else f"{where}: {_summary(error)}"

    def _execute(self) -> ModuleType:
        if _sources(self.path) != self._sources:
            raise FileError(f"{self.path}: changed since it was named {self.name}; run again, or restore it")
        name = f"model_{self.name.replace('-', '_')}"
        module = ModuleType(name)
        module.__file__ = str(self.path)
        sys.modules[name] = module  # dataclasses look up their module
        for file in self._sources:  # modules of another folder, or an earlier version
            sys.modules.pop(file.removesuffix(".py").removesuffix("/__init__").replace("/", "."), None)
        write, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # cached code may be older by less than 1 s
        try:
            # The file is executed once per process, so what it draws must not depend on the first model's seed.
            with user_code(self), global_generators(0), torch.device("cpu"):
                exec(compile(self._sources[""], str(self.path), "exec"), module.__dict__)
        finally:
            sys.dont_write_bytecode = write
        return module

    @contextmanager
    def _on_path(self) -> Iterator[None]:
        """Let the file import modules beside it, as ``python FILE.py`` does."""
        folder = str(self.path.parent)
        sys.path.insert(0, folder)
        try:
            yield
        finally:
            sys.path.remove(folder)
            if folder not in sys.path:
                sys.path.append(folder)  # for imports in forward


def _sources(path: Path) -> dict[str, bytes]:
    """Read a file, named "", and the modules beside it that it imports, by their paths relative to its folder.

    Raises:
        FileError: The file is missing, or one of the files has a syntax error.
    """
    found: dict[str, bytes] = {}
    todo = [("", path)]
    while todo:
        name, file = todo.pop()
        try:
            found[name] = file.read_bytes()
            tree = ast.parse(found[name], str(file))
        except OSError as error:
            raise FileError(f"{file}: cannot be read ({error.strerror}); give FILE.py:NAME") from error
        except (SyntaxError, ValueError) as error:  # ValueError: null bytes
            line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
            raise FileError(f"{file}{line}: {getattr(error, 'msg', error)}; correct the file") from error
        for module in _imports(tree, file.relative_to(path.parent).parent):
            base = path.parent / module
            for each in (base.with_name(f"{base.name}.py"), base / "__init__.py"):
                relative = str(each.relative_to(path.parent))
                if relative not in found and each != path and each.is_file():
                    todo.append((relative, each))
    return found


def _imports(tree: ast.Module, folder: Path) -> Iterator[Path]:
    """Yield the imported modules, and names that may be modules, as paths relative to the folder of the model's file.

    Args:
        tree: A file's syntax tree.
        folder: The file's folder, relative to that of the model's file, for relative imports.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = folder.parts[: len(folder.parts) - node.level + 1] if node.level else ()
            home = ".".join([*above, *([node.module] if node.module else [])])
            names = [home, *(f"{home}.{alias.name}".lstrip(".") for alias in node.names)]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] in _PROJECT or parts[0] in sys.stdlib_module_names:
                continue
            for count in range(1, len(parts) + 1):  # a package's __init__.py runs before its modules
                if all(parts[:count]):
                    yield Path(*parts[:count])


@contextmanager
def user_code(source: SourceFile | None) -> Iterator[None]:
    """Report errors of a user's code in one line with file and line.

    Args:
        source: The user's file; None for code of a library.

    Raises:
        FileError: The code raises any error other than this project's.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        line = None if source is None else source.line_of(error)
        where = "the model" if source is None else source.path
        raise FileError(line or f"{where}: {_summary(error)}") from error


def _summary(error: BaseException) -> str:
    """The type and the message of an error in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def check_outputs(
    model: Any, num_classes: int, in_channels: int, image_size: int, text: str, source: SourceFile | None
) -> None:
    """Check a model on one batch of two images, in evaluation and in training mode.

    Parameters, buffers, modes and random states are unchanged.

    Args:
        model: What the builder returned.
        num_classes: Number of logits.
        in_channels: Channels of the images.
        image_size: Height and width of the images.
        text: The value of ``--model``, for messages.
        source: The user's file; None for a library's model.

    Raises:
        ArgumentError: The model does not support these images.
        FileError: The user's model fails, or its outputs are not finite logits ``(2, num_classes)``.
    """
    if not isinstance(model, torch.nn.Module):
        raise FileError(f"{text}: returned {_kind(model)}, not a torch.nn.Module")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise FileError(f"{text}: has no trainable parameters")
    first = next(model.parameters())
    if first.is_meta:
        return
    if any(torch.nn.parameter.is_lazy(value) for value in (*model.parameters(), *model.buffers())):
        raise FileError(f"{text}: has lazy layers, whose weights would not depend on the seed; give their sizes")
    from src.models.base import eval_mode, two_images

    images = two_images(in_channels, image_size).to(first.dtype)

    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        for training in (False, True):
            where = "in training mode" if training else "in evaluation mode"
            with eval_mode(model), torch.no_grad(), global_generators(0):
                model.train(training)
                try:
                    with user_code(source):
                        outputs = model(images.clone())
                except FileError as error:
                    if source is not None:
                        raise
                    raise ArgumentError(
                        "model",
                        f"{text}: does not support {image_size}x{image_size}x{in_channels} images "
                        f"({str(error).removeprefix('the model: ')}); choose another model or image size",
                    ) from error
            if not isinstance(outputs, torch.Tensor) or outputs.shape != (2, num_classes):
                raise FileError(
                    f"{text}: {where}, returned {_kind(outputs)} for two images; it must return a tensor of logits "
                    f"(2, {num_classes})"
                )
            if not outputs.is_floating_point() or not outputs.isfinite().all():
                raise FileError(f"{text}: {where}, its logits are not finite floating-point numbers")
            if not training and (outputs >= 0).all() and (outputs.sum(dim=1) - 1).abs().max() < 1e-3:
                log.warning("%s: returns probabilities that sum to 1; it should return logits, without softmax", text)
    finally:
        for name, buffer in model.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])


def _kind(value: Any) -> str:
    """Describe a value for messages."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)}"
    return f"an object of type {type(value).__name__}"


# ------------------------------------------------------------------------------------------- timm and torchvision


def build_timm(
    name: str, num_classes: int, in_channels: int, image_size: int, pretrained: bool | str | Path = False
) -> nn.Module:
    """Build a model of the timm package.

    Args:
        name: A name that ``timm.create_model`` accepts, such as ``resnet18`` or ``vit_tiny_patch16_224``.
        num_classes: Number of logits.
        in_channels: Channels of the images.
        image_size: Height and width of the images, given to models that depend on it, such as vision transformers.
        pretrained: True to download timm's weights, or the path of a file with such weights. timm adapts the first
            convolution and position embeddings, and keeps the head only if the number of classes matches.

    Raises:
        ArgumentError: timm is not installed, has no such model, or the model does not support the sizes.
        FileError: The pretrained weights cannot be downloaded or read, or do not fit the model.
    """
    text = f"timm:{name}"
    try:
        import_module("src._torchvision")  # before timm, which imports torchvision
        timm = import_module("timm")
    except ImportError as error:
        raise ArgumentError(
            "model", f"{text}: needs the package timm; install it with: pip install -r requirements-timm.txt"
        ) from error
    if not timm.is_model(name.split(".")[0]):
        raise ArgumentError(
            "model", f"{text}: timm {timm.__version__} has no such model{_close(name, timm.list_models())}"
        )
    options: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_channels, "img_size": image_size}
    if pretrained:
        options["pretrained"] = True
    stored = None if isinstance(pretrained, bool) else read_weights(pretrained)
    if stored is not None:
        options["pretrained_cfg_overlay"] = {"state_dict": stored, "hf_hub_id": None, "url": None}
    try:
        try:
            model = timm.create_model(name, **options)
        except TypeError as error:  # most convolutional models do not take an image size
            if "img_size" not in str(error):
                raise
            del options["img_size"]
            model = timm.create_model(name, **options)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if stored is not None:
            raise FileError(f"{pretrained}: does not fit {text} ({reason}); give weights of this model") from error
        if pretrained:
            raise FileError(
                f"{text}: its pretrained weights cannot be downloaded ({reason}); give a local file with "
                "--pretrained=FILE"
            ) from error
        raise ArgumentError(
            "model",
            f"{text}: cannot be built for {image_size}x{image_size}x{in_channels} images ({reason}); choose another "
            "model or image size",
        ) from error
    if stored is not None:  # timm ignores missing and unexpected weights
        heads = model.pretrained_cfg.get("classifier") or ()
        free = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
        recomputed = ("relative_position_index", "attn_mask")  # constants in older files
        for key in sorted(set(model.state_dict()) ^ set(stored)):
            if not key.startswith(free) and not key.endswith(recomputed):
                raise FileError(
                    f"{pretrained}: does not fit {text} ({key} is missing or unexpected); give weights of this model"
                )
    return model


def _close(name: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name."""
    close = difflib.get_close_matches(name, known, 3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def build_torchvision(
    name: str, num_classes: int, in_channels: int, image_size: int, pretrained: bool | str | Path = False
) -> nn.Module:
    """Build an image classification model of torchvision.

    For images without three channels, the first convolution gets new weights for their number.

    Args:
        name: A name in ``torchvision.models``, such as ``resnet18``.
        num_classes: Number of logits.
        in_channels: Channels of the images.
        image_size: Height and width of the images, given to vision transformers.
        pretrained: True to download torchvision's default weights, or the path of a file with such weights. Head and
            first convolution are loaded only if they have the right shape. The position embeddings of vision
            transformers are resized to the image size.

    Raises:
        ArgumentError: torchvision has no such model, or the model does not support the sizes.
        FileError: The pretrained weights cannot be downloaded or read, or do not fit the model.
    """
    from src._torchvision import torchvision

    text, models = f"torchvision:{name}", torchvision.models
    known = models.list_models(module=models)
    if name not in known:
        raise ArgumentError("model", f"{text}: torchvision has no such image classifier{_close(name, known)}")
    options: dict[str, Any] = {}
    if name in ("inception_v3", "googlenet"):
        options = {"aux_logits": False, "init_weights": True}
    if name.startswith("vit_"):
        options = {"image_size": image_size}
    builder = models.get_model_builder(name)
    try:
        model = builder(num_classes=num_classes, **options)
        if in_channels != 3:
            _replace_first_convolution(model, in_channels)
    except Exception as error:  # torchvision raises several types, such as AssertionError
        raise ArgumentError(
            "model",
            f"{text}: cannot be built for {image_size}x{image_size}x{in_channels} images ({error}); "
            "choose another model",
        ) from error
    if not pretrained:
        return model
    if pretrained is True:
        try:
            stored = models.get_model_weights(name).DEFAULT.get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise FileError(
                f"{text}: its weights could not be downloaded ({error}); give a local file with --pretrained=FILE"
            ) from error
    else:
        stored = read_weights(pretrained)
    with torch.device("meta"):
        original = builder(**options).state_dict()
    own = model.state_dict()
    stored = {key: value for key, value in stored.items() if not key.lower().startswith("aux")}
    where = text if pretrained is True else str(pretrained)
    if (positions := stored.get("encoder.pos_embedding")) is not None:
        from src.models.vit import resize_positions

        with suppress(KeyError, ValueError, RuntimeError):  # of another architecture; refused below
            stored["encoder.pos_embedding"] = resize_positions(positions, own["encoder.pos_embedding"].shape[1])
    fits = {key for key in own if key in stored and stored[key].shape == own[key].shape}
    for key in sorted({*own, *stored}):
        if key not in fits and not (key in own and key in stored and stored[key].shape == original[key].shape):
            raise FileError(f"{where}: does not fit {text} ({key} is missing, unexpected or of another shape)")
    model.load_state_dict({key: stored[key] if key in fits else own[key] for key in own})
    if skipped := sorted(set(own) - fits):
        log.info("%s: %s keep their random initial values, because the sizes differ", where, ", ".join(skipped))
    return model


def _replace_first_convolution(model: nn.Module, in_channels: int) -> None:
    """Give a model's first convolution new weights for another number of input channels.

    Raises:
        ValueError: The first convolution does not take three channels.
    """
    conv = next((module for module in model.modules() if isinstance(module, torch.nn.Conv2d)), None)
    if conv is None or conv.in_channels != 3 or conv.groups != 1:
        raise ValueError("its first convolution does not take three channels")
    conv.in_channels = in_channels
    conv.weight = torch.nn.Parameter(torch.empty(conv.out_channels, in_channels, *conv.kernel_size))
    conv.reset_parameters()


# ------------------------------------------------------------------------------------------------ weights in files


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a state dict from a file.

    The file may contain the state dict itself, or a dict with it under ``state_dict``, ``model_state_dict``,
    ``model_state`` or ``model``, such as this project's checkpoints. The prefixes of DistributedDataParallel and
    torch.compile are removed. ``.safetensors`` files are read if that package is installed.

    Raises:
        FileError: The file is missing or damaged, or contains no state dict.
    """
    if Path(path).suffix == ".safetensors":
        try:
            from safetensors.torch import load_file

            found: Mapping[str, Any] = load_file(path)
        except ImportError as error:
            raise FileError(f"{path}: needs the package safetensors; install it with pip") from error
        except Exception as error:
            raise FileError(f"{path}: cannot be read as a safetensors file ({error})") from error
    else:
        found = read_checkpoint(path)
        inner = next((found[key] for key in _WRAPPERS if isinstance(found.get(key), Mapping)), None)
        found = found if inner is None else inner
    weights = {}
    for key, value in found.items():
        while isinstance(key, str) and key.startswith(_PREFIXES):
            key = key.split(".", 1)[1]
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise FileError(
                f"{path}: is not a state dict ({key!s:.40} is a {type(value).__name__}, not a tensor); save one with "
                "torch.save(model.state_dict(), FILE)"
            )
        weights[key] = value
    if not weights:
        raise FileError(f"{path}: contains no weights")
    return weights


def load_initial(model: nn.Module, path: str | Path, name: str, num_classes: int) -> None:
    """Load a file's weights into a model. All names and shapes must agree.

    Args:
        model: The model.
        path: See ``read_weights``.
        name: The model's name, for messages.
        num_classes: The model's number of logits.

    Raises:
        FileError: The file is not readable, or its weights do not fit the model.
    """
    from src.models.base import load_weights

    stored, own = read_weights(path), model.state_dict()
    differing = [key for key in own if key in stored and stored[key].shape != own[key].shape]
    heads = [key for key in differing if own[key].shape == (num_classes, *stored[key].shape[1:])]
    if differing and heads == differing and set(stored) == set(own):
        key = differing[0]
        raise FileError(
            f"{path}: its head is for {len(stored[key])} classes ({key}), but the data set has {num_classes}; give "
            "weights for these classes"
        )
    try:
        load_weights(model, stored)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        if missing := [key for key in own if key not in stored]:
            reason = f"{missing[0]} is missing"
        elif extra := [key for key in stored if key not in own]:
            reason = f"{extra[0]} is not a weight of the model"
        raise FileError(f"{path}: does not fit the model {name} ({reason}); give weights of this model") from error
