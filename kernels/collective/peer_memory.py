"""Memory of each GPU of a host that the kernels of all its ranks reach: CUDA's handles between processes, exchanged at a store.

The allocation is CUDA's own and not the allocator's of PyTorch, which would share with it whatever lies beside it. Knows addresses;
does not know what is written there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch._C._distributed_c10d import Store

HANDLE_BYTES = 64  # CUDA_IPC_HANDLE_SIZE
LAZY_PEER_ACCESS = 1  # cudaIpcMemLazyEnablePeerAccess


class _Handle(ctypes.Structure):
    _fields_ = (("content", ctypes.c_char * HANDLE_BYTES),)


@cache
def _runtime() -> ctypes.CDLL:
    """The CUDA runtime that PyTorch has loaded. Raises RuntimeError where it is linked in."""
    with open("/proc/self/maps") as maps:
        path = next((line.split()[-1] for line in maps if "libcudart" in line), None)
    if path is None:
        raise RuntimeError("this PyTorch has no CUDA runtime of its own file")
    library = ctypes.CDLL(path)
    library.cudaGetErrorString.restype = ctypes.c_char_p
    library.cudaIpcOpenMemHandle.argtypes = (ctypes.POINTER(ctypes.c_void_p), _Handle, ctypes.c_uint)
    for name in ("cudaFree", "cudaIpcCloseMemHandle"):
        getattr(library, name).argtypes = (ctypes.c_void_p,)
    return library


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_runtime(), name)(*arguments)
    if status:
        raise RuntimeError(f"{name}: {_runtime().cudaGetErrorString(status).decode()}")


class PeerMemory:
    """As many bytes on each rank's GPU, zeros at first; `addresses` by rank, as this process sees them."""

    def __init__(self, store: Store, rank: int, size: int, num_bytes: int, together: Callable[[bool], bool]) -> None:
        """All ranks call it, rank r with its GPU as the current one.

        together: whether all ranks say true. Raises RuntimeError on all of them where one has no way to the others' memory.
        """
        self._own = ctypes.c_void_p()
        self._opened: list[ctypes.c_void_p] = []
        failure: RuntimeError | None = None
        try:
            _call("cudaMalloc", ctypes.byref(self._own), ctypes.c_size_t(num_bytes))
            _call("cudaMemset", self._own, 0, ctypes.c_size_t(num_bytes))
            _call("cudaDeviceSynchronize")
            handle = _Handle()
            _call("cudaIpcGetMemHandle", ctypes.byref(handle), self._own)
            store.set(f"memory-{rank}", bytes(handle))
        except RuntimeError as error:
            failure = error
        if together(failure is None):
            try:
                self.addresses = [
                    self._own.value if other == rank else self._open(store, rank, other) for other in range(size)
                ]
            except RuntimeError as error:
                failure = error
        elif failure is None:
            failure = RuntimeError("another rank has no memory to share")
        if not together(failure is None):
            self.close()
            raise failure or RuntimeError("another rank has no way to this one's memory")

    def _open(self, store: Store, rank: int, other: int) -> int | None:
        if not torch.cuda.can_device_access_peer(rank, other):
            raise RuntimeError(f"GPU {rank} has no peer access to GPU {other}")
        address = ctypes.c_void_p()
        handle = _Handle.from_buffer_copy(store.get(f"memory-{other}"))
        _call("cudaIpcOpenMemHandle", ctypes.byref(address), handle, LAZY_PEER_ACCESS)
        self._opened.append(address)
        return address.value

    def close(self) -> None:
        """Let go of the others' memory and free this rank's, which no kernel uses from then on."""
        while self._opened:
            _call("cudaIpcCloseMemHandle", self._opened.pop())
        if self._own.value:
            own, self._own = self._own, ctypes.c_void_p()
            _call("cudaFree", own)
