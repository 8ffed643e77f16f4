"""CUDA clients that misbehave on purpose, through the driver's library alone: `python -m benchmarks.gpu_clients fault`.

`fill` allocates until the driver refuses, `fault` writes to an address that is nobody's, `hold N` holds N MiB until
its standard input closes. Each prints one JSON line.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

MIB = 1 << 20
_STEP = 128 * MIB
# Stores 1 to address 16: an illegal access, fatal to the context and, under MPS, to all of the GPU's clients.
_PTX = b"""
.version 6.4
.target sm_75
.address_size 64
.visible .entry bad()
{
    .reg .u64 %place;
    .reg .u32 %value;
    mov.u64 %place, 16;
    mov.u32 %value, 1;
    st.global.u32 [%place], %value;
    ret;
}
"""


class CudaError(RuntimeError):
    """A call of the driver's library failed."""

    def __init__(self, call: str, code: int) -> None:
        super().__init__(f"{call} answered {code}")
        self.code = code


class Cuda:
    """A context on device 0, and the calls needed here."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            raise CudaError(name, code)

    def allocate(self, size_bytes: int) -> None:
        self.call("cuMemAlloc_v2", ctypes.byref(ctypes.c_uint64()), ctypes.c_size_t(size_bytes))


def fill(cuda: Cuda) -> dict[str, Any]:
    """How much could be allocated, and the driver's answer to more (2: out of memory)."""
    allocated = 0
    try:
        while True:
            cuda.allocate(_STEP)
            allocated += _STEP
    except CudaError as error:
        return {"allocated_mib": allocated // MIB, "code": error.code}


def fault(cuda: Cuda) -> dict[str, Any]:
    """The driver's answer after the illegal access (700: illegal address)."""
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    cuda.call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(_PTX))
    cuda.call("cuModuleGetFunction", ctypes.byref(function), module, ctypes.c_char_p(b"bad"))
    try:
        cuda.call("cuLaunchKernel", function, 1, 1, 1, 1, 1, 1, 0, None, None, None)
        cuda.call("cuCtxSynchronize")
    except CudaError as error:
        return {"code": error.code}
    return {"code": 0}


def main() -> int:
    kind = sys.argv[1]
    cuda = Cuda()
    if kind == "hold":
        cuda.allocate(int(sys.argv[2]) * MIB)
        print(json.dumps({"held_mib": int(sys.argv[2])}), flush=True)
        sys.stdin.read()
    else:
        print(json.dumps({"fill": fill, "fault": fault}[kind](cuda)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
