"""CUDA devices without a GPU: their tensors live on the CPU, and every wait of the host is seen.

A :class:`CudaTensor` says that it is on "cuda:0" or "cuda:1", and keeps its numbers on the CPU.
:class:`Devices` runs each operator on these, and records it. Tensors of the host stay plain.

What is modelled of a device:

* Work is queued. Whatever makes the host wait until it is done is recorded as a wait: reading a
  number, a blocking copy, an operator whose result has a shape that depends on numbers.
* A copy to pinned memory with ``non_blocking=True`` has arrived once the host has waited for an
  event that was recorded after it on the same device. Before, the pinned tensor holds NaN, or -1.
* An operator takes tensors of one device only, except for scalars of the host.

What is not: backward, since autograd asks for a real accelerator; generators; several streams of a
device; sparse tensors; setting ``.data``.

The simulation writes into a registry of libc10 and into ``torch.cuda``, and does not undo it. Use
it in a process of its own.
"""

import ctypes
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch.optim.optimizer import _foreach_supported_types
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

COUNT = 2  # GPUs
STAGED = 1 << 16  # bytes that are copied to a device without a wait, from whatever memory
CPU = torch.device("cpu")

# Of enum DeviceType in c10.
CUDA = 1
META = 14
DEVICE_TYPES = 21

aten = torch.ops.aten
COPIES = (aten.copy_, aten._to_copy, aten._foreach_copy_)
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
# The host needs a number of their result, or its shape.
READS = (
    aten._local_scalar_dense,
    aten._unique2,
    aten.bincount,
    aten.equal,
    aten.masked_select,
    aten.nonzero,
    aten.unique_consecutive,
    aten.unique_dim,
)


class CudaTensor(torch.Tensor):
    """A tensor of a simulated device; ``numbers`` is the CPU tensor with its numbers."""

    @staticmethod
    def __new__(cls, numbers, device):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=device,
        )
        tensor.numbers = numbers
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} was called outside the simulation")

    def __repr__(self, **_):
        return f"{self.numbers!r} on {self.device}"

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, **_):
        raise TypeError("can't convert a cuda tensor to numpy. Use Tensor.cpu() first.")


def put(tensor, device):
    """The CPU tensor on a device, as if it had always been there."""
    device = torch.device(device)
    return tensor if device == CPU else CudaTensor(tensor, device)


class Operator(NamedTuple):
    """An operator that was called on tensors of a device.

    Attributes:
        name: Of the operator.
        is_view: Whether it launches nothing.
        is_slow: Whether it launches once for each tensor of a list: its number is a tensor of
            another dtype.
    """

    name: str
    is_view: bool
    is_slow: bool


class Arrival(NamedTuple):
    """What an asynchronous copy brings from a device to a pinned tensor."""

    pinned: torch.Tensor
    numbers: torch.Tensor
    device: torch.device


class Devices(TorchDispatchMode):
    """Runs operators on the simulated devices.

    Attributes:
        operators: Those called on tensors of a device since :meth:`next_step`.
        waits: What made the host wait for a device since then.
        step: Number of calls of :meth:`next_step`.
    """

    def __init__(self):
        super().__init__()
        self.operators = []
        self.waits = []
        self.step = 0
        self._pinned = {}  # tensors by address, which they keep from being used again
        self._pending = []

    def __enter__(self):
        _simulate(self)
        return super().__enter__()

    def next_step(self):
        """From here on the work so far is done: waiting for an event of it is no wait."""
        self.step += 1
        self.operators = []
        self.waits = []

    def wait(self, reason):
        """The host waits until all work is done."""
        self.waits.append(reason)
        self.arrive(self._pending)

    def pending(self, device):
        """The asynchronous copies from a device that have not arrived."""
        return [arrival for arrival in self._pending if arrival.device == device]

    def arrive(self, arrivals):
        """The numbers of asynchronous copies are there."""
        arrived = set(map(id, arrivals))
        with _disable_current_modes():
            for arrival in arrivals:
                arrival.pinned.copy_(arrival.numbers)
        self._pending = [arrival for arrival in self._pending if id(arrival) not in arrived]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        packet = func.overloadpacket
        if packet is aten.record_stream:
            return None
        if packet is aten.is_pinned:
            return self._is_pinned(args[0])
        pins = kwargs.pop("pin_memory", False)
        if packet is aten._pin_memory:
            func = aten.clone.default
            pins = True

        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        target = _device_of_result(packet, kwargs, tensors)
        is_asynchronous = False
        if target != CPU or any(isinstance(t, CudaTensor) for t in tensors):
            self.operators.append(Operator(str(func), _is_view(func), _is_slow(func, args)))
            if packet in COPIES:
                is_asynchronous = self._copies_without_wait(func, args, kwargs, target)
            else:
                _check_devices(func, tensors)
                self._look_for_wait(func, args)

        result = _run(func, args, kwargs, tensors, target)
        if pins:
            self._pin(result)
        if is_asynchronous and target == CPU:
            source = next(t.device for t in tensors if t.device != CPU)
            for pinned in tree_leaves(args[0] if packet is aten._foreach_copy_ else result):
                self._pin(pinned)
                self._send(pinned, source)
        return result

    def _look_for_wait(self, func, args):
        if func.overloadpacket in READS:
            self.wait(str(func))
        if func.overloadpacket in INDEXING:
            for index in args[1]:
                if index is None:
                    continue
                if index.dtype in (torch.bool, torch.uint8):
                    self.wait(f"{func} with a mask")
                elif index.device == CPU and index.dim() > 0:
                    self.wait(f"{func} with an index on the host")

    def _copies_without_wait(self, func, args, kwargs, target):
        """Whether a copy is asynchronous. If it is not, the host waits."""
        places = {argument.name: i for i, argument in enumerate(func._schema.arguments)}
        place = places["non_blocking"]
        non_blocking = args[place] if place < len(args) else kwargs.get("non_blocking", False)
        if func.overloadpacket is aten._to_copy:
            # What `to` makes on the host is pinned if it must not wait.
            pairs = [(None, args[0])]
        elif func.overloadpacket is aten.copy_:
            pairs = [args[:2]]
        else:
            pairs = zip(args[0], args[1], strict=True)
        is_asynchronous = non_blocking
        for destination, source in pairs:
            to = target if destination is None else destination.device
            if source.device.type == to.type:
                continue
            if to == CPU:
                is_free = destination is None or self._is_pinned(destination)
            else:
                is_free = self._is_pinned(source) or source.nbytes <= STAGED
            if not (non_blocking and is_free):
                self.wait(f"{func} from {source.device} to {to}")
                is_asynchronous = False
        return is_asynchronous

    def _is_pinned(self, tensor):
        return tensor.device == CPU and tensor.untyped_storage().data_ptr() in self._pinned

    def _pin(self, tensor):
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor

    def _send(self, pinned, device):
        with _disable_current_modes():
            self._pending.append(Arrival(pinned, pinned.clone(), device))
            pinned.fill_(torch.nan if pinned.is_floating_point() else -1)


def _run(func, args, kwargs, tensors, target):
    """The operator on the numbers; its result on the target."""
    own = {id(t.numbers): t for t in tensors if isinstance(t, CudaTensor)}
    args, kwargs = tree_map_only(CudaTensor, lambda t: t.numbers, (args, kwargs))
    if kwargs.get("device") is not None:
        kwargs["device"] = CPU
    with _disable_current_modes(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what differs on the CPU
        result = func(*args, **kwargs)

    def on_target(numbers):
        if id(numbers) in own:  # it was written in place
            return own[id(numbers)]
        return put(numbers, target)

    return tree_map_only(torch.Tensor, on_target, result)


def _device_of_result(packet, kwargs, tensors):
    if kwargs.get("device") is not None:
        return _device(kwargs["device"])
    if packet is aten._local_scalar_dense:
        return CPU
    if packet in COPIES:
        return tensors[0].device if tensors else CPU
    for t in tensors:
        if t.device != CPU:
            return t.device
    return CPU


def _device(device):
    device = torch.device(device)
    # Without an index it is the current device, for which torch asks the guard: that of meta.
    if device.type == "meta" or device == torch.device("cuda"):
        return torch.device("cuda", 0)
    return device


def _is_view(func):
    aliases = [returned.alias_info for returned in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _is_slow(func, args):
    if "_foreach_" not in str(func) or len(args) < 2 or not isinstance(args[1], torch.Tensor):
        return False
    number = args[1]
    return number.device != CPU and any(t.dtype != number.dtype for t in args[0])


def _check_devices(func, tensors):
    """Raise where CUDA would."""
    devices = {t.device for t in tensors if t.device != CPU or t.dim() > 0}
    if len(devices) > 1 and func.overloadpacket not in INDEXING:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {func} got {devices}"
        )


class _Stream:
    """For ``torch.cuda.Stream``. A device has one, in order."""

    def __init__(self, devices, device):
        self.device = device
        self._devices = devices

    def synchronize(self):
        self._devices.wait("Stream.synchronize")


class _Event:
    """For ``torch.cuda.Event``."""

    devices: Devices

    def __init__(self, *_, **__):
        self._step = None
        self._arrivals = []

    def record(self, stream=None):
        device = _device("cuda") if stream is None else stream.device
        self._step = self.devices.step
        self._arrivals = self.devices.pending(device)

    def synchronize(self):
        if self._step == self.devices.step:
            self.devices.wait("Event.synchronize in the step that recorded it")
        self.devices.arrive(self._arrivals)
        self._arrivals = []


def _simulate(devices):
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    registry = (ctypes.c_void_p * DEVICE_TYPES).in_dll(
        library, "_ZN3c104impl26device_guard_impl_registryE"
    )
    registry[CUDA] = registry[META]  # a view asks for the guard of its device
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(x, device="cuda")` comes by the mode
    _foreach_supported_types.append(CudaTensor)  # else foreach is not the default

    cuda = torch.cuda
    cuda._lazy_init = lambda: None
    cuda.is_available = lambda: True
    cuda.is_initialized = lambda: True
    cuda.device_count = lambda: COUNT
    cuda.current_device = lambda: 0
    cuda.is_current_stream_capturing = lambda: False
    cuda.current_stream = lambda device=None: _Stream(devices, _device(device or "cuda"))
    cuda.synchronize = lambda device=None: devices.wait("torch.cuda.synchronize")
    cuda.Event = type("Event", (_Event,), {"devices": devices})
