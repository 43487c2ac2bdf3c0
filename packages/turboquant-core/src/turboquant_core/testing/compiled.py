"""What a kernel compiles to, where there is no GPU to run it on."""

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.bool: "*i1",
    torch.float8_e4m3fn: "*fp8e4nv",
}


@dataclass(frozen=True)
class Compiled:
    """Attributes: PTX, bytes of shared memory of a program, and registers and bytes of stack of a thread."""

    ptx: str
    shared_bytes: int
    registers: int
    stack_bytes: int


class Recorder:
    """Stands in for a kernel: takes a launch and keeps what it passes.

    Attributes:
        arguments: The kernel's, by name.
        options: The compiler's.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.arguments: dict[str, Any] = {}
        self.options: dict[str, Any] = {}

    def __getitem__(self, grid: object) -> "Recorder":
        return self

    def __call__(self, *args: object, **kwargs: object) -> None:
        """Keep the launch."""
        passed = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
        self.arguments = {x.name: passed.pop(x.name, x.default) for x in self.kernel.params}
        self.options = {name: x for name, x in passed.items() if x is not None}

    def compile(self, arch: int, folder: Path) -> Compiled:
        """The kernel as that launch would compile it for an architecture such as 90; files go to the folder."""
        source = (GluonASTSource if self.kernel.is_gluon() else ASTSource)(
            self.kernel, *signature(self.kernel, self.arguments)
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=self.options)
        cubin = folder / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
        registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
        return Compiled(compiled.asm["ptx"], compiled.metadata.shared, registers, stack)


def signature(kernel: Any, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """Kinds, constants and attributes of arguments, as a launch would find them; tensors count as aligned."""
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}

    def kind(path: tuple[int, ...], x: Any, specialized: bool) -> Any:
        if isinstance(x, tuple):
            # Triton specialises what is in a tuple whatever is said of its argument.
            kinds = [kind((*path, i), part, True) for i, part in enumerate(x)]
            return type(x)(*kinds) if hasattr(x, "_fields") else tuple(kinds)
        if x is None or (specialized and type(x) is int and x == 1):
            return constant(path, x)
        if isinstance(x, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return _TYPES[x.dtype]
        if isinstance(x, float):
            return "fp32"
        if specialized and x % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32"

    def constant(path: tuple[int, ...], x: Any) -> str:
        constants[path] = x
        return "constexpr"

    kinds = {
        name: constant((i,), x) if parameter.is_constexpr else kind((i,), x, not parameter.do_not_specialize)
        for i, ((name, x), parameter) in enumerate(zip(arguments.items(), kernel.params, strict=True))
    }
    return kinds, constants, attributes
