"""Weights where the modules of transformers expect parameters, and arrays and tensors on one memory.

Owns what torch's functions do with a weight. Must not know: attention, models.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import nn

from tramontane.kernels import Array, Ops
from tramontane.weights import Weight


def to_tensor(array: Array) -> Any:
    """A tensor on the array's own memory."""
    if isinstance(array, torch.Tensor):
        return array
    if array.dtype == ml_dtypes.bfloat16:
        return to_tensor(array.view(np.int16)).view(torch.bfloat16)
    if array.dtype == ml_dtypes.float8_e4m3fn:
        return to_tensor(array.view(np.uint8)).view(torch.float8_e4m3fn)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def to_array(ops: Ops, tensor: Any) -> Array:
    """The array that `ops` works on, over the tensor's own memory; a copy where that has holes."""
    tensor = tensor.detach().contiguous()
    if ops.name == "torch":
        return tensor
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


class WeightTensor(torch.Tensor):  # type: ignore[misc]
    """A Weight, or a stack of them, in the place of a module's float32 parameter.

    Products and lookups go to the Weight. Stacking, joining rows and turning, which is how transformers makes its
    parameters of what a checkpoint holds, make other WeightTensors. What else torch is asked to do with it gets the
    dequantized values.
    """

    weights: tuple[tuple[Weight, ...], ...]
    """For each of the stack, the weights that its rows consist of."""
    stacked: bool
    transposed: bool
    """The module sees [K, N], as layers of GPT-2 do."""
    asked: bool
    """Whether torch wanted the values."""

    @staticmethod
    def __new__(
        cls: type[WeightTensor],
        weights: Sequence[Sequence[Weight]],
        *,
        stacked: bool = False,
        transposed: bool = False,
        device: Any = None,
    ) -> WeightTensor:
        """`device`: that of the weights' ops, where it is known already."""
        first = weights[0]
        shape = (sum(weight.shape[0] for weight in first), first[0].shape[1])
        shape = shape[::-1] if transposed else shape
        device = device or to_tensor(first[0].ops.zeros((1,), "float32")).device
        made: WeightTensor = torch.Tensor._make_wrapper_subclass(
            cls, (len(weights), *shape) if stacked else shape, dtype=torch.float32, device=device
        )
        made.weights = tuple(tuple(parts) for parts in weights)
        made.stacked, made.transposed, made.asked = stacked, transposed, False
        return made

    def __repr__(self) -> str:
        return f"WeightTensor({list(self.shape)}, {self.weights[0][0].format})"

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        result = _FUNCTIONS[function](*args, **kwargs) if function in _FUNCTIONS else NotImplemented
        if result is not NotImplemented:
            return result
        return function(*_dense(tuple(args)), **{name: _dense(value) for name, value in kwargs.items()})

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{function} on a weight")

    def dense(self) -> Any:
        """The values, float32."""
        self.asked = True
        whole = [np.concatenate([weight.dequantize() for weight in parts]) for parts in self.weights]
        whole = [np.ascontiguousarray(values.T) if self.transposed else values for values in whole]
        return to_tensor(np.stack(whole) if self.stacked else whole[0]).to(self.device)

    def like(self, weights: Sequence[Sequence[Weight]], **changes: bool) -> WeightTensor:
        """Other weights, laid as these are but for the changes."""
        layout = {"stacked": self.stacked, "transposed": self.transposed, **changes}
        return WeightTensor(weights, device=self.device, **layout)


def _dense(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_dense(item) for item in value)
    return value.dense() if isinstance(value, WeightTensor) else value


def _single(weight: Any, transposed: bool, *others: Any) -> bool:
    """Whether it is one matrix that lies this way, and the others are no weights."""
    fits = isinstance(weight, WeightTensor) and not weight.stacked and weight.transposed == transposed
    return fits and not any(isinstance(other, WeightTensor) for other in others)


def _product(x: Any, weight: WeightTensor, bias: Any = None) -> Any:
    """x[..., K] @ W.T (+ b), float32."""
    flat = x.reshape(-1, x.shape[-1]).to(torch.float32)
    biases = [None] * len(weight.weights[0])
    if bias is not None:
        biases = bias.to(torch.float32).split([part.shape[0] for part in weight.weights[0]])
    outs = []
    for part, own in zip(weight.weights[0], biases, strict=True):
        out = flat.new_empty(len(flat), part.shape[0])
        ops = part.ops
        part.matmul(to_array(ops, out), to_array(ops, flat), None if own is None else to_array(ops, own))
        outs.append(out)
    whole = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
    return whole.view(*x.shape[:-1], whole.shape[1])


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    return _product(x, weight, bias) if _single(weight, False, x, bias) else NotImplemented


def _matmul(x: Any, weight: Any) -> Any:
    return _product(x, weight) if _single(weight, True, x) else NotImplemented


def _addmm(bias: Any, x: Any, weight: Any) -> Any:
    return _product(x, weight, bias) if _single(weight, True, bias, x) else NotImplemented


def _rows(ids: Any, weight: Any, *_: Any, **__: Any) -> Any:
    """The rows `ids`: an embedding."""
    if not _single(weight, False) or len(weight.weights[0]) > 1:
        return NotImplemented
    held = weight.weights[0][0]
    flat = ids.reshape(-1).to(torch.int32)
    out = torch.empty(len(flat), held.shape[1], dtype=torch.float32, device=ids.device)
    held.rows(to_array(held.ops, out), to_array(held.ops, flat))
    return out.view(*ids.shape, held.shape[1])


def _item(weight: Any, index: Any) -> Any:
    """All of it, one of a stack, or rows."""
    if index is ...:
        return weight
    integers = isinstance(index, torch.Tensor) and index.dtype in (torch.int64, torch.int32)
    if weight.stacked and (isinstance(index, int) or (integers and index.dim() == 0)):
        return weight.like([weight.weights[int(index)]], stacked=False)
    return _rows(index, weight) if integers and index.dim() else NotImplemented


def _turned(weight: Any, *dims: int) -> Any:
    last = {len(weight.shape) - 1, len(weight.shape) - 2}
    if (weight.stacked and not dims) or (dims and {dim % len(weight.shape) for dim in dims} != last):
        return NotImplemented
    return weight.like(weight.weights, transposed=not weight.transposed)


def _stack(tensors: Sequence[Any], dim: int = 0) -> Any:
    first = tensors[0]
    fit = all(_single(tensor, False) and tensor.shape == first.shape for tensor in tensors)
    return first.like([tensor.weights[0] for tensor in tensors], stacked=True) if fit and dim == 0 else NotImplemented


def _cat(tensors: Sequence[Any], dim: int = 0) -> Any:
    """Rows beside rows."""
    first = tensors[0]
    alike = all(
        isinstance(tensor, WeightTensor)
        and (tensor.stacked, tensor.transposed, len(tensor.weights), tensor.shape[-1])
        == (first.stacked, False, len(first.weights), first.shape[-1])
        for tensor in tensors
    )
    if not alike or dim != (1 if first.stacked else 0):
        return NotImplemented
    return first.like([sum(parts, ()) for parts in zip(*(tensor.weights for tensor in tensors), strict=True)])


def _same(weight: Any, *_: Any, **__: Any) -> Any:
    return weight


_FUNCTIONS: Mapping[Any, Callable[..., Any]] = {
    nn.functional.linear: _linear,
    nn.functional.embedding: _rows,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.addmm: _addmm,
    torch.Tensor.__getitem__: _item,
    torch.Tensor.t: _turned,
    torch.Tensor.transpose: _turned,
    torch.transpose: _turned,
    torch.Tensor.T.__get__: _turned,
    torch.stack: _stack,
    torch.cat: _cat,
    torch.Tensor.to: _same,
    torch.Tensor.detach: _same,
    torch.Tensor.contiguous: _same,
    torch.Tensor.requires_grad_: _same,
}
_ATTRIBUTES = "shape dtype device ndim requires_grad grad grad_fn is_leaf is_meta layout"
_METHODS = "size dim numel is_floating_point is_complex __len__"
_METADATA = {
    *(getattr(torch.Tensor, name).__get__ for name in _ATTRIBUTES.split()),
    *(getattr(torch.Tensor, name) for name in _METHODS.split()),
}
"""What is known without the values."""
