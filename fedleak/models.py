"""The networks of the paper by name, and anybody's network by factory."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from fedleak.errors import FedleakError, InvalidInputError
from fedleak.modules import renamed
from fedleak.registry import Registry

#: A model is a factory: ``factory(input_shape=(C, H, W), classes=10) -> nn.Module``.
ModelFactory = Callable[..., nn.Module]
MODELS: Registry[ModelFactory] = Registry("model", "fedleak.models")

#: (filters, kernel, stride, padding) of each convolution. Chen & Campbell 2022, table 1;
#: which two networks they call CNN3-V1 and V2 is our best reading.
PAPER_NETWORKS: dict[str, list[tuple[int, int, int, int]]] = {
    "cnn2-v1": [(6, 3, 1, 0)],
    "cnn2-v2": [(6, 4, 2, 0)],
    "cnn3-v1": [(6, 3, 1, 0), (3, 4, 2, 0)],
    "cnn3-v2": [(6, 4, 2, 0), (3, 3, 2, 0)],
    "cnn4-v1": [(6, 3, 1, 0), (5, 4, 2, 0), (3, 4, 1, 0)],
    "cnn4-v2": [(16, 5, 1, 0), (6, 5, 2, 0), (32, 5, 1, 2)],
}


def conv_chain(
    convolutions: Sequence[tuple[int, int, int, int]],
    input_shape: tuple[int, int, int] = (3, 32, 32),
    classes: int = 10,
    activation: Callable[[], nn.Module] = nn.Tanh,
    name: str = "conv_chain",
) -> nn.Sequential:
    """Build convolutions with an activation each, then one fully connected head.

    Parameters
    ----------
    convolutions : sequence of (filters, kernel, stride, padding)
    input_shape : tuple of int
        Shape (C, H, W) of one image.
    classes : int
        Number of logits.
    activation : callable
        Makes the activation after each convolution.
    name : str
        The network's name, for messages.

    Raises
    ------
    InvalidInputError
        If the image is too small for the kernels.
    """
    channels, height, width = input_shape
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (filters, kernel, stride, padding) in enumerate(convolutions, 1):
        layers[f"conv{i}"] = nn.Conv2d(channels, filters, kernel, stride, padding)
        layers[f"act{i}"] = activation()
        if min(height, width) + 2 * padding < kernel:
            raise InvalidInputError(
                f"model {name!r} does not fit images of shape {tuple(input_shape)}: before "
                f"convolution {i} only {height}x{width} pixels are left for a {kernel}x{kernel} "
                "kernel; use larger images or a shallower model such as 'cnn2-v1'"
            )
        height = (height + 2 * padding - kernel) // stride + 1
        width = (width + 2 * padding - kernel) // stride + 1
        channels = filters
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(channels * height * width, classes)
    return nn.Sequential(layers)


def _paper_network(name: str) -> ModelFactory:
    def factory(
        input_shape: tuple[int, int, int] = (3, 32, 32), classes: int = 10
    ) -> nn.Sequential:
        return conv_chain(PAPER_NETWORKS[name], input_shape, classes, name=name)

    layers = ", ".join(f"{f} of {k}x{k} by {s}" for f, k, s, _ in PAPER_NETWORKS[name])
    factory.__doc__ = f"Convolutions ({layers}), tanh after each, and a fully connected layer."
    return factory


for _name in PAPER_NETWORKS:
    MODELS.register(_name)(_paper_network(_name))


@MODELS.register("mlp")
def mlp(
    input_shape: tuple[int, int, int] = (3, 32, 32), classes: int = 10, units: int = 1000
) -> nn.Sequential:
    """Two fully connected layers, 1,000 units with ReLU between them: what most tampers need."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    layers["hidden"] = nn.Linear(math.prod(input_shape), units)
    layers["act"] = nn.ReLU()
    layers["fc"] = nn.Linear(units, classes)
    return nn.Sequential(layers)


def build_model(
    spec: str,
    input_shape: tuple[int, int, int],
    classes: int,
    seed: int | None = None,
    weights: str | Path | None = None,
) -> nn.Module:
    """Make a model by name or by factory.

    Parameters
    ----------
    spec : str
        A registered name (``"cnn2-v1"``), ``"path/to/file.py:factory"`` or
        ``"package.module:factory"``. A factory is called with those of the keyword
        arguments ``input_shape``, ``classes`` and ``num_classes`` that it takes.
    input_shape : tuple of int
        Shape (C, H, W) of one image.
    classes : int
        Number of classes.
    seed : int, optional
        Draws the weights reproducibly, without touching torch's global generator.
    weights : path, optional
        A checkpoint to load: ``.safetensors``, or a state dict of ``torch.save``,
        read with ``weights_only=True`` (no code in it can run).

    Returns
    -------
    nn.Module

    Raises
    ------
    UnknownNameError, InvalidInputError
        If the model cannot be found or made, or the checkpoint does not fit it.
    """
    factory = load_factory(spec) if ":" in spec else MODELS[spec]
    if not callable(factory):
        raise InvalidInputError(f"model {spec!r} is a {type(factory).__name__}, not a factory")
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            model = call_factory(factory, tuple(input_shape), classes)
        except FedleakError:
            raise
        except Exception as error:  # a stranger's factory may raise anything
            raise InvalidInputError(
                f"model {spec!r} cannot be made: {type(error).__name__}: {error}"
            ) from error
    if not isinstance(model, nn.Module):
        raise InvalidInputError(
            f"model {spec!r} made a {type(model).__name__}, not a torch.nn.Module"
        )
    if weights is not None:
        load_weights(model, weights)
    return model


def call_factory(factory: ModelFactory, input_shape: tuple[int, ...], classes: int) -> object:
    """Call a factory with those keywords that it takes."""
    offered = {"input_shape": input_shape, "classes": classes, "num_classes": classes}
    parameters = inspect.signature(factory).parameters.values()
    named = {k: v for k, v in offered.items() if k in {p.name for p in parameters}}
    if named or not any(p.kind is p.VAR_KEYWORD for p in parameters):
        return factory(**named)
    # ``**kwargs`` may be handed on to something that takes only some of them.
    for keywords in (("input_shape", "classes"), ("num_classes",)):
        try:
            return factory(**{k: offered[k] for k in keywords})
        except TypeError as error:
            if "unexpected keyword" not in str(error):
                raise
    return factory()


@lru_cache(maxsize=32)
def load_factory(spec: str) -> ModelFactory:
    """Return the object that ``FILE.py:NAME`` or ``module:NAME`` names."""
    where, _, attribute = spec.rpartition(":")
    try:
        if where.endswith(".py"):
            path = Path(where)
            if not path.is_file():
                raise InvalidInputError(f"model {spec!r}: there is no file {where!r}")
            found = importlib.util.spec_from_file_location(f"fedleak_user_{path.stem}", path)
            assert found is not None and found.loader is not None
            module = importlib.util.module_from_spec(found)
            sys.modules[found.name] = module  # as an import does; dataclasses look there
            found.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
        factory = getattr(module, attribute)
    except InvalidInputError:
        raise
    except (Exception, SystemExit) as error:  # a stranger's file may do anything
        raise InvalidInputError(
            f"model {spec!r} cannot be loaded ({error}); give FILE.py:FACTORY or module:FACTORY"
        ) from error
    return factory


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a checkpoint into ``model``, in place.

    Raises
    ------
    InvalidInputError
        If the file is missing, unreadable, or names or shapes differ from the model's.
    """
    path = Path(path)
    if not path.is_file():
        raise InvalidInputError(f"checkpoint {str(path)!r} does not exist")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: dict[str, Tensor] = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the formats raise many kinds
        raise InvalidInputError(
            f"checkpoint {str(path)!r} cannot be read as a state dict: {error}"
        ) from error
    expected = model.state_dict()
    state = renamed(state, expected)
    problems = [f"{k!r} is missing" for k in expected if k not in state]
    problems += [f"{k!r} is not in the model" for k in state if k not in expected]
    problems += [
        f"{k!r} has shape {tuple(state[k].shape)}, the model wants {tuple(expected[k].shape)}"
        for k in expected
        if k in state and state[k].shape != expected[k].shape
    ]
    if problems:
        raise InvalidInputError(
            f"checkpoint {str(path)!r} does not fit the model: {'; '.join(problems[:5])}"
        )
    model.load_state_dict(state)
